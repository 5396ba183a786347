import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from denserl_cli.core.chat.format import ChatFormat
from denserl_cli.core.chat.loading import load_chat
from denserl_cli.core.data import batches
from denserl_cli.core.data.batches import EncodedPairRow, SequenceBatch, collate_sides
from denserl_cli.core.data.loading import load_pairs
from denserl_cli.core.engine.random_state import seed_everything
from denserl_cli.core.errors import DenserlError, Interrupted
from denserl_cli.core.models.reward_metadata import RewardRecord
from denserl_cli.core.models.scalar_head import load_scalar_model, token_values
from denserl_cli.core.observer import TIMES, Observer
from denserl_cli.core.recipe import Recipe
from denserl_cli.core.reward_model import trainer as reward_training
from denserl_cli.core.reward_model.trainer import STAGE, RewardTrainer
from denserl_cli.core.runs.folder import RunFolder
from denserl_cli.core.scoring.segment_cache import SegmentCache
from denserl_cli.core.stages.run import run_stage
from denserl_cli.core.system.environment import versions
from tests import ROOT
from tests.core.conftest import MakeRecipe
from tests.fakes import RecordingObserver

STEPS = 7  # 56 of the 64 pairs train, 8 at a time


class Killed(Exception):
    """Stands for a process that is gone."""


def weights(folder: Path) -> bytes:
    return (folder / "reward_model" / "model.safetensors").read_bytes()


def metrics(folder: Path) -> list[dict[str, float]]:
    """The logged metrics of every step, without its times."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def train(recipe: Recipe, folder: Path, mode: str = "start", observer: Observer | None = None):
    run_stage(STAGE, recipe, folder, mode, observer or Observer())  # type: ignore[arg-type]
    return folder


def dies_after(step: int) -> RecordingObserver:
    def die(done: int) -> None:
        if done == step:
            raise Killed

    return RecordingObserver(die)


def presses_ctrl_c_after(step: int) -> RecordingObserver:
    return RecordingObserver(
        lambda done: signal.raise_signal(signal.SIGINT) if done == step else None
    )


def trainer(recipe: Recipe, folder: Path) -> RewardTrainer:
    tokenizer, chat = load_chat(recipe)
    rows = load_pairs(recipe, chat, Observer()).train
    seed_everything(recipe.seed)
    run = RunFolder(folder, recipe)
    batches = [np.arange(8)]
    return RewardTrainer(
        recipe,
        run,
        Observer(),
        rows=rows,
        evaluation=[],
        batches=batches,
        tokenizer=tokenizer,
        pad_id=chat.pad_id,
    )


# what is logged


def test_one_pair_is_shown_at_the_first_step_and_with_each_evaluation(
    recipe: MakeRecipe, tmp_path: Path
):
    folder = train(recipe("reward_model.eval_every=3"), tmp_path / "run")
    text = (folder / "samples.jsonl").read_text()
    shown = [json.loads(line) for line in text.splitlines()]
    assert [(line["step"], line["label"]) for line in shown] == [
        (step, label) for step in (1, 3, 6, STEPS) for label in ("chosen", "rejected")
    ]
    texts = {
        (line["label"], line["prompt"], "".join(part["text"] for part in line["segments"]))
        for line in shown
    }
    assert len(texts) == 2  # the same two responses each time
    for line in shown:  # the score is the mean of the segments' values
        values = [part["value"] for part in line["segments"]]
        assert line["score"] == pytest.approx(sum(values) / len(values), abs=1e-5)
    assert shown[0]["score"] != shown[-2]["score"]
    quiet = train(recipe("run.log_samples=0", "reward_model.epochs=0.15"), tmp_path / "quiet")
    assert not (quiet / "samples.jsonl").exists()


# the same bytes


def test_a_seed_decides_every_byte(recipe: MakeRecipe, trained: Path, tmp_path: Path):
    assert weights(train(recipe(), tmp_path / "again")) == weights(trained)
    assert metrics(tmp_path / "again") == metrics(trained)
    assert weights(train(recipe("seed=7"), tmp_path / "other")) != weights(trained)


@pytest.mark.parametrize("step", [1, 2, 5, STEPS])
def test_a_killed_run_resumes_to_the_same_bytes(
    recipe: MakeRecipe, trained: Path, tmp_path: Path, step: int
):
    folder = tmp_path / "run"
    with pytest.raises(Killed):
        train(recipe(), folder, observer=dies_after(step))
    with pytest.raises(DenserlError, match="was interrupted"):
        train(recipe(), folder)
    recorder = RecordingObserver()
    train(recipe(), folder, "resume", recorder)
    # a checkpoint every second step; the last one had been logged and not yet kept
    last = step - 1 - (step - 1) % 2
    expected = [f"resuming after step {last} of {STEPS}"] if last else []
    assert [notice for notice in recorder.notices if "resuming" in notice] == expected
    assert weights(folder) == weights(trained)
    assert metrics(folder) == metrics(trained)


def test_ctrl_c_keeps_the_step_that_is_under_way(recipe: MakeRecipe, trained: Path, tmp_path: Path):
    folder = tmp_path / "run"
    with pytest.raises(Interrupted, match=f"stopped after step 3 of {STEPS}") as caught:
        train(recipe(), folder, observer=presses_ctrl_c_after(3))
    assert caught.value.exit_code == 130
    assert caught.value.hint and "--resume" in caught.value.hint
    recorder = RecordingObserver()
    train(recipe(), folder, "resume", recorder)
    assert f"resuming after step 3 of {STEPS}" in recorder.notices
    assert weights(folder) == weights(trained)


def test_ctrl_c_in_the_last_step_finishes(recipe: MakeRecipe, trained: Path, tmp_path: Path):
    folder = train(recipe(), tmp_path / "run", observer=presses_ctrl_c_after(STEPS))
    assert weights(folder) == weights(trained)


def test_resume_with_nothing_to_resume_starts(recipe: MakeRecipe, trained: Path, tmp_path: Path):
    assert weights(train(recipe(), tmp_path / "run", "resume")) == weights(trained)


def test_a_finished_run_is_left_alone_and_done_again_when_asked(
    recipe: MakeRecipe, run_with_model: Path
):
    before, recorder = weights(run_with_model), RecordingObserver()
    for mode in ("start", "resume"):
        train(recipe(), run_with_model, mode, recorder)
    assert recorder.titles == [] and len(recorder.notices) == 2
    assert all("is finished; nothing to do" in notice for notice in recorder.notices)
    train(recipe("reward_model.learning_rate=1e-4"), run_with_model, "fresh")
    assert weights(run_with_model) != before
    old = run_with_model / "replaced" / "reward_model.1" / "model.safetensors"
    assert old.read_bytes() == before


# real signals


def start_process(settings: list[str], folder: Path) -> subprocess.Popen:
    """A training of 56 steps in a process of its own, stopped nowhere near its end."""
    words = [w for s in (*settings, "reward_model.epochs=8") for w in ("--set", s)]
    process = subprocess.Popen(
        [sys.executable, "-m", "denserl_cli.app", "train-rm", "-r", "sandbox-segment", *words,
         "--out", str(folder)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    file, deadline = folder / "metrics.jsonl", time.monotonic() + 120
    while not file.exists() or file.read_text().count("\n") < 5:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.002)
    return process


@pytest.fixture(scope="module")
def long_run(recipe: MakeRecipe, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The weights of an uninterrupted training of 56 steps."""
    folder = tmp_path_factory.mktemp("long") / "run"
    return weights(train(recipe("reward_model.epochs=8"), folder))


@pytest.mark.parametrize(
    ("number", "writing", "code"),
    [
        (signal.SIGKILL, False, -signal.SIGKILL),
        (signal.SIGKILL, True, -signal.SIGKILL),
        (signal.SIGINT, False, 130),
        (signal.SIGTERM, False, 75),
    ],
)
def test_a_process_that_gets_a_signal_resumes_to_the_same_bytes(
    recipe: MakeRecipe,
    settings: list[str],
    long_run: bytes,
    tmp_path: Path,
    number: signal.Signals,
    writing: bool,
    code: int,
):
    folder = tmp_path / "run"
    process = start_process(settings, folder)
    while writing and not list(folder.glob(f"checkpoints/{STAGE}/.step-*.tmp")):
        assert process.poll() is None
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == code
    if code > 0:
        assert "interrupted: stopped after step" in errors and "--resume" in errors
        assert not (folder / "lock").exists()
    assert "Traceback" not in errors
    done = len(metrics(folder))
    assert 5 <= done < 8 * STEPS and not (folder / "reward_model").exists()
    recorder = RecordingObserver()
    train(recipe("reward_model.epochs=8"), folder, "resume", recorder)
    assert any(notice.startswith("resuming after step") for notice in recorder.notices)
    assert weights(folder) == long_run


# the algorithm


def gradients(made: RewardTrainer, order: np.ndarray, monkeypatch) -> tuple[dict, torch.Tensor]:
    """Metrics of one update and the whole gradient of its step."""
    found = []
    real = made.engine.check

    def look() -> None:
        found.append(torch.cat([p.grad.flatten() for p in made.engine.parameters]))
        real()

    monkeypatch.setattr(made.engine, "check", look)
    return made.update(1, order), found[0]


def test_accumulated_micro_batches_are_the_whole_batch(
    recipe: MakeRecipe, tmp_path: Path, monkeypatch
):
    order = np.arange(8)
    found = [
        gradients(
            trainer(recipe(f"reward_model.micro_batch_size={size}"), tmp_path), order, monkeypatch
        )
        for size in (8, 4, 1)
    ]
    (whole, gradient), *others = found
    for metrics, other in others:
        assert metrics == pytest.approx(whole, rel=1e-4, abs=1e-6)
        torch.testing.assert_close(other, gradient, rtol=1e-4, atol=1e-6)


def test_passes_of_similar_length_are_the_whole_batch(
    recipe: MakeRecipe, tmp_path: Path, monkeypatch
):
    asked, found = recipe("reward_model.micro_batch_size=8", "model.packing=false"), []
    for cost in (10**6, 10, 0):  # of a pass: one, some, one a length
        monkeypatch.setattr(batches, "PASS_TOKENS", {"cpu": cost, "cuda": cost})
        found.append(gradients(trainer(asked, tmp_path), np.arange(8), monkeypatch))
    (whole, gradient), *others = found
    for metrics, other in others:
        assert metrics == pytest.approx(whole, rel=1e-4, abs=1e-6)
        torch.testing.assert_close(other, gradient, rtol=1e-4, atol=1e-6)


def test_packed_sequences_are_the_padded_ones(recipe: MakeRecipe, tmp_path: Path, monkeypatch):
    found = []
    for packing in ("true", "false"):
        made = trainer(recipe(f"model.packing={packing}"), tmp_path)
        assert made.packs == (packing == "true")
        made.evaluation = made.rows[:6]
        evaluated = {k: v for k, v in made.evaluate().items() if isinstance(v, float)}
        metrics, gradient = gradients(made, np.arange(8), monkeypatch)
        found.append((metrics | evaluated, gradient))
    (packed, gradient), (padded, other) = found
    assert len(packed) > 10 and packed == pytest.approx(padded, rel=1e-4, abs=1e-6)
    torch.testing.assert_close(other, gradient, rtol=1e-4, atol=1e-6)


def test_the_order_within_a_batch_does_not_matter(recipe: MakeRecipe, tmp_path: Path, monkeypatch):
    first, second = (
        gradients(trainer(recipe(), tmp_path), order, monkeypatch)
        for order in (np.arange(8), np.arange(8)[::-1].copy())
    )
    assert first[0] == pytest.approx(second[0], rel=1e-4, abs=1e-6)
    torch.testing.assert_close(first[1], second[1], rtol=1e-4, atol=1e-6)


def test_micro_batches_train_to_the_same_weights(recipe: MakeRecipe, tmp_path: Path):
    runs = [
        train(recipe(f"reward_model.micro_batch_size={size}"), tmp_path / str(size))
        for size in (8, 1)
    ]
    lines = [[line["loss"] for line in metrics(folder)] for folder in runs]
    assert lines[0] == pytest.approx(lines[1], rel=1e-3)
    models = [
        load_scalar_model(recipe().model, path=str(f / "reward_model"), fresh_head=False,
                          trained=False)
        for f in runs
    ]  # fmt: skip
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=2e-4)


def test_gradient_checkpointing_changes_nothing(recipe: MakeRecipe, tmp_path: Path, monkeypatch):
    plain, checkpointed = (
        gradients(
            trainer(recipe(f"model.gradient_checkpointing={on}"), tmp_path),
            np.arange(8),
            monkeypatch,
        )
        for on in ("false", "true")
    )
    torch.testing.assert_close(plain[1], checkpointed[1])


def test_only_the_reward_model_learns(recipe: MakeRecipe, tmp_path: Path):
    made = trainer(recipe("optimizer.warmup_ratio=0"), tmp_path)
    assert made.scorer.reference is not None
    reference = made.scorer.reference.model
    before = [p.clone() for p in reference.parameters()]
    start = [p.clone() for p in made.engine.parameters]
    made.update(1, np.arange(8))
    assert all(torch.equal(*pair) for pair in zip(before, reference.parameters(), strict=True))
    assert all(p.grad is None and not p.requires_grad for p in reference.parameters())
    assert not reference.training
    assert not any(torch.equal(*pair) for pair in zip(start, made.engine.parameters, strict=True))


def test_other_granularities_need_no_reference(recipe: MakeRecipe, tmp_path: Path):
    for name, segments in (("token", None), ("bandit", 1.0)):
        words = [f"segmentation.granularity={name}", "segmentation.cutoff=null"]
        made = trainer(recipe(*words), tmp_path)
        assert made.scorer.reference is None
        rows = made.rows[:8]
        count = np.mean([len(r) - 1 for row in rows for r in (row.chosen, row.rejected)])
        metrics = made.update(1, np.arange(8))
        assert metrics["segments_per_response"] == pytest.approx(segments or count)


def test_the_metrics_are_those_of_the_scores(recipe: MakeRecipe, tmp_path: Path, monkeypatch):
    made = trainer(recipe("reward_model.micro_batch_size=8", "model.packing=false"), tmp_path)
    places = {row.origin: place for place, row in enumerate(made.rows[:8])}

    def collate(rows: Sequence[EncodedPairRow], numbers: np.ndarray, *rest: Any) -> SequenceBatch:
        shown.append([places[rows[n % 8].origin] + n // 8 * 8 for n in numbers.tolist()])
        return collate_sides(rows, numbers, *rest)

    def fixed(_: object, batch: SequenceBatch) -> torch.Tensor:
        values = torch.tensor(shown[-1])[:, None].expand(batch.response_mask.shape)
        return values + 0 * next(made.engine.model.parameters()).sum()

    shown: list[list[int]] = []
    monkeypatch.setattr(batches, "PASS_TOKENS", {"cpu": 1, "cuda": 1})
    monkeypatch.setattr(reward_training, "collate_sides", collate)
    monkeypatch.setattr(reward_training, "token_values", fixed)
    metrics = made.update(1, np.arange(8))  # chosen score 0..7, rejected 8..15
    assert len(shown) > 1  # passes
    assert metrics["loss"] == pytest.approx(np.log1p(np.exp(8)))  # -log sigmoid(-8)
    assert metrics["accuracy"] == 0
    assert metrics["reward_mean"] == pytest.approx(7.5)
    assert metrics["reward_std"] == pytest.approx(np.arange(16).std())


def test_a_margin_raises_the_loss(recipe: MakeRecipe, tmp_path: Path):
    made = trainer(recipe(), tmp_path)
    first, *others = made.rows
    losses = []
    for margin in (None, 0.0, 3.0):
        made.rows = [replace(first, margin=margin), *others]
        losses.append(made.forward(np.zeros(1, int), [np.arange(2)])["loss"].item())
    assert losses[0] == losses[1] < losses[2]


def test_the_reference_reads_each_response_once_over_all_runs(
    recipe: MakeRecipe, trained: Path, tmp_path: Path, monkeypatch
):
    monkeypatch.setenv("DENSERL_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "run"
    assert weights(train(recipe("run.log_samples=0"), folder)) == weights(trained)
    (kept,) = (tmp_path / "cache" / "segments").iterdir()
    before = kept.read_bytes()

    def refused(*_: Any) -> None:
        raise AssertionError("a response was not known")

    with monkeypatch.context() as patch:
        patch.setattr(SegmentCache, "_write", refused)
        assert weights(train(recipe(), tmp_path / "again")) == weights(trained)
        slower = recipe("reward_model.learning_rate=1e-5", "reward_model.epochs=1")
        train(slower, tmp_path / "slower")
    kept.write_bytes(before[: len(before) // 2])  # a job that was killed
    assert weights(train(recipe(), tmp_path / "torn")) == weights(trained)
    assert kept.read_bytes() == before
    train(recipe("segmentation.cutoff=1.5"), tmp_path / "other")
    assert len(list(kept.parent.iterdir())) == 2


def test_training_tells_chosen_from_rejected(recipe: MakeRecipe, tmp_path: Path):
    folder = train(recipe("reward_model.epochs=12"), tmp_path / "run")
    lines = metrics(folder)
    assert lines[0]["loss"] == pytest.approx(np.log(2), abs=0.1)
    assert np.mean([line["loss"] for line in lines[-5:]]) < 0.5


def test_the_last_step_evaluates_and_the_summary_says_so(trained: Path, recipe: MakeRecipe):
    last = metrics(trained)[-1]
    summary = RunFolder(trained, recipe()).summary(STAGE)
    assert summary is not None
    assert (summary["steps"], summary["pairs"]) == (STEPS, 58)
    names = ("loss", "accuracy", "reward_mean", "reward_std", "segments_per_response",
             "longer_accuracy")  # fmt: skip
    assert {name: summary[f"eval_{name}"] for name in names} == {
        name: last[f"eval_{name}"] for name in names
    }
    assert "eval_loss" not in metrics(trained)[0]


def test_the_evaluation_tells_accuracy_by_length_difference(trained: Path, recipe: MakeRecipe):
    last = metrics(trained)[-1]
    _, chat = load_chat(recipe())
    held = load_pairs(recipe(), chat, Observer()).evaluation
    bins: Any = last["eval_lengths"]
    assert sum(one["pairs"] for one in bins) == len(held)
    right = sum(one["pairs"] * one["accuracy"] for one in bins)
    assert right / len(held) == pytest.approx(last["eval_accuracy"])
    longer = [len(row.chosen) - len(row.rejected) for row in held]
    shares = [one["pairs"] for one in bins if (one["shortest"] or 0) > 0]
    assert sum(shares) == sum(difference > 0 for difference in longer)
    assert -1 <= last["eval_length_correlation"] <= 1
    summary = RunFolder(trained, recipe()).summary(STAGE)
    assert summary is not None and "eval_lengths" not in summary


def test_a_stage_says_what_it_ran_with(trained: Path):
    stage = json.loads((trained / "run.json").read_text())["stages"][STAGE]
    assert stage["versions"] == versions() and stage["versions"].keys() >= {"torch", "python"}
    assert (stage["processes"], isinstance(stage["device"], str)) == (1, True)


def test_evaluation_is_every_so_often(recipe: MakeRecipe, tmp_path: Path):
    folder = train(recipe("reward_model.eval_every=3"), tmp_path / "run")
    steps = [line["step"] for line in metrics(folder) if "eval_loss" in line]
    assert steps == [3, 6, STEPS]


def test_evaluation_changes_no_weights(recipe: MakeRecipe, trained: Path, tmp_path: Path):
    assert weights(train(recipe("reward_model.eval_every=1"), tmp_path / "run")) == weights(trained)


def test_the_evaluation_pairs_are_segmented_once(recipe: MakeRecipe, tmp_path: Path, monkeypatch):
    made = trainer(recipe("reward_model.micro_batch_size=2"), tmp_path)
    made.evaluation = made.rows[:9]
    first = made.evaluate()
    monkeypatch.setattr(made, "scorer", None)
    assert made.evaluate() == first and first["eval_segments_per_response"] > 1


# what is left


def test_the_reward_model_loads_without_denserl(recipe: MakeRecipe, trained: Path):
    folder = trained / "reward_model"
    plain = AutoModelForSequenceClassification.from_pretrained(folder)
    assert plain.config.num_labels == 1 and plain.config.pad_token_id is not None
    tokenizer, chat = load_chat(recipe())
    rows = load_pairs(recipe(), chat, Observer()).train[:1]
    batch = collate_sides(rows, [0], chat.pad_id)
    ours = load_scalar_model(recipe().model, path=str(folder), fresh_head=False, trained=False)
    values = token_values(ours, batch)[0, len(rows[0].chosen) - 1]
    ids = torch.tensor([[*rows[0].prompt, *rows[0].chosen]])
    with torch.no_grad():
        expected = plain(input_ids=ids).logits[0, 0]
    torch.testing.assert_close(values, expected)
    kept = type(tokenizer).from_pretrained(folder)
    assert kept.chat_template == tokenizer.chat_template


def test_what_it_was_trained_with_travels_along(recipe: MakeRecipe, trained: Path):
    record = RewardRecord.load(trained / "reward_model")
    tokenizer, _ = load_chat(recipe())
    assert (record.granularity, record.cutoff, record.aggregate) == ("segment", 1.0, "mean")
    assert record.reference == recipe().model.path
    assert record.terminator_id == ChatFormat.of(tokenizer).terminator_id
    record.check(recipe(), trained)
    for setting, text in (
        ("segmentation.cutoff=2.0", "segmentation.cutoff is 2.0, the .* with 1.0"),
        ("reward_model.aggregate=sum", "reward_model.aggregate is sum"),
    ):
        with pytest.raises(DenserlError, match=text):
            record.check(recipe(setting), trained)


@pytest.mark.parametrize("damage", [None, "{", "[]", '{"schema": 2}', '{"schema": 1, "x": 1}'])
def test_a_missing_or_damaged_record_is_one_error(tmp_path: Path, damage: str | None):
    if damage is not None:
        (tmp_path / "denserl.json").write_text(damage)
    with pytest.raises(DenserlError, match="no reward model" if damage is None else "is damaged"):
        RewardRecord.load(tmp_path)


# NaN


def nan_at(step: int, real: Callable) -> Callable:
    """`RewardTrainer.forward` whose loss is NaN in one step (two micro-batches each)."""
    calls = iter(range(10**6))

    def forward(self: RewardTrainer, *batch: Any) -> dict[str, torch.Tensor]:
        metrics = real(self, *batch)
        bad = next(calls) // 2 == step - 1
        return {**metrics, "loss": metrics["loss"] * (float("nan") if bad else 1.0)}

    return forward


def test_a_nan_stops_with_the_step_and_keeps_the_batch(
    recipe: MakeRecipe, trained: Path, tmp_path: Path, monkeypatch
):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(RewardTrainer, "forward", nan_at(4, RewardTrainer.forward))
        with pytest.raises(DenserlError, match=r"train-rm stopped at step 4: .*nan") as caught:
            train(recipe(), folder)
    assert caught.value.exit_code == 2
    batch = torch.load(folder / "nonfinite" / "train-rm-00000004" / "batch.pt")
    assert len(batch["origin"]) == 8 and "preferences.jsonl:" in batch["origin"][0]
    for name in ("prompt", "chosen", "rejected"):
        assert len(batch[name]) == 8
        assert all(ids.dtype == torch.int32 and len(ids) > 1 for ids in batch[name])
    assert [line["step"] for line in metrics(folder)] == [1, 2, 3]
    train(recipe(), folder, "resume")
    assert weights(folder) == weights(trained)
