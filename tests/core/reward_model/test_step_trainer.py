"""train-rm, and what follows it, on labelled steps."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from denserl_cli.core.chat.loading import load_chat
from denserl_cli.core.data.arrow_rows import StepRows
from denserl_cli.core.data.batches import collate_sequences
from denserl_cli.core.data.loading import load_pairs
from denserl_cli.core.data.local_rows import first_rows_problems
from denserl_cli.core.errors import DenserlError
from denserl_cli.core.evaluation.reward_model import evaluate_reward_model
from denserl_cli.core.inspection.data_report import report_sources
from denserl_cli.core.models.scalar_head import token_values
from denserl_cli.core.observer import Observer
from denserl_cli.core.recipe import Recipe
from denserl_cli.core.reporting.record import read_runs
from denserl_cli.core.reporting.report import make_report
from denserl_cli.core.reward_model.metrics import first_wrong_accuracy
from denserl_cli.core.reward_model.step_segments import step_segments_notice
from denserl_cli.core.reward_model.step_trainer import StepTrainer
from denserl_cli.core.runs.folder import RunFolder
from denserl_cli.core.sandbox.files import SandboxFiles
from denserl_cli.core.stages.run import run_stage
from tests.core.conftest import MakeRecipe
from tests.core.reward_model.test_trainer import Killed, dies_after, metrics, train, weights
from tests.fakes import RecordingObserver

MakeSteps = Callable[..., Recipe]


@pytest.fixture(scope="session")
def steps(
    slots: SandboxFiles, recipe: MakeRecipe, tmp_path_factory: pytest.TempPathFactory
) -> MakeSteps:
    """Makes a recipe on labelled steps: three words each, right by a sum."""
    file = tmp_path_factory.mktemp("steps") / "steps.jsonl"
    lines = []
    for line in slots.preferences.read_text().splitlines():
        row = json.loads(line)
        *prompt, answer = row["chosen"]
        words = answer["content"].split()
        parts = [" ".join(words[n : n + 3]) for n in range(0, len(words), 3)]
        labels = [sum(map(ord, part)) % 3 > 0 for part in parts]
        lines.append({"prompt": prompt, "completions": parts, "labels": labels})
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return lambda *more: recipe(f"data.preferences=[{file}]", *more)


def trainer(recipe: Recipe, folder: Path) -> StepTrainer:
    tokenizer, chat = load_chat(recipe)
    data = load_pairs(recipe, chat, Observer())
    rows = {"rows": data.train, "evaluation": data.evaluation, "batches": [np.arange(8)]}
    run = RunFolder(folder, recipe)
    return StepTrainer(recipe, run, Observer(), **rows, tokenizer=tokenizer, pad_id=chat.pad_id)


def test_the_loss_of_a_step_is_that_of_all_its_labels_by_hand(steps: MakeSteps, tmp_path: Path):
    for size in (8, 1):  # however the batch is cut
        made = trainer(steps(f"reward_model.micro_batch_size={size}"), tmp_path / str(size))
        made.engine.model.eval()
        rows, losses, right = [made.rows[i] for i in range(8)], [], []
        for row in rows:
            batch = collate_sequences([row.prompt], [row.response], made.pad_id)
            with torch.no_grad():
                values = token_values(made.engine.model, batch)[0]
            for end, label in zip(row.ends, row.labels, strict=True):
                chance = 1 / (1 + math.exp(-values[end].item()))
                losses.append(-math.log(chance if label else 1 - chance))
                right.append((values[end].item() > 0) == bool(label))
        found = made.update(1, np.arange(8))
        assert found["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
        assert found["accuracy"] == pytest.approx(np.mean(right), abs=1e-6)
        assert len(losses) == sum(len(row.ends) for row in rows) > 8


def test_first_wrong_steps():
    values = np.array([1.0, -1, -1, 1, -1, 2, 3, 1, 1])
    labels = np.array([1.0, 0, 1, 0, 0, 1, 1, 0.4, 1])
    counts = np.array([3, 2, 2, 2])  # found; too late; all right, and so taken; not found
    assert first_wrong_accuracy(values, labels, counts) == {
        "first_wrong_accuracy": pytest.approx(1 / 3),
        "all_right_accuracy": 1.0,
    }
    only = first_wrong_accuracy(values[5:7], labels[5:7], counts[2:3])
    assert only == {"first_wrong_accuracy": None, "all_right_accuracy": 1.0}


def test_a_killed_run_goes_on_to_the_same_bytes(steps: MakeSteps, tmp_path: Path):
    made = steps("segmentation={granularity: segment, cut: newline, cutoff: null}")
    whole = train(made, tmp_path / "whole")
    with pytest.raises(Killed):
        train(made, tmp_path / "killed", observer=dies_after(5))
    resumed = train(made, tmp_path / "killed", mode="resume")
    assert weights(resumed) == weights(whole)
    assert metrics(resumed) == metrics(whole)
    last = metrics(whole)[-1]
    assert {"eval_loss", "eval_accuracy", "eval_first_wrong_accuracy"} <= last.keys()
    assert not any("longer" in name or "segments_per" in name for name in last)
    sample = json.loads((whole / "samples.jsonl").read_text().splitlines()[0])
    assert len(sample["segments"]) == len(sample["labels"])


def test_what_is_learned_serves_the_other_stages(steps: MakeSteps, tmp_path: Path):
    made, observer = steps("reward_model.epochs=6", "normalizer.kind=global"), RecordingObserver()
    folder = train(made, tmp_path / "run", observer=observer)
    assert sum("will score other segments" in line for line in observer.notices) == 1
    lines = metrics(folder)
    assert lines[-1]["eval_loss"] < lines[0]["loss"]
    run = RunFolder(folder, made)
    found = evaluate_reward_model(made, run, Observer(), name="steps")
    assert found["accuracy"] == pytest.approx(lines[-1]["eval_accuracy"], abs=1e-6)
    assert found["loss"] == pytest.approx(lines[-1]["eval_loss"], abs=1e-5)
    assert found["responses"] == 6 and found["labelled_steps"] > 6
    run_stage("fit-function", made, folder, "start", Observer())
    assert json.loads(run.normalizer.read_text())
    assert make_report(read_runs([folder])).runs
    [found] = report_sources(made, made.data.preferences[0])
    assert (found.kind, found.usable, found.skipped) == ("responses in labelled steps", 64, [])
    assert not list(first_rows_problems(made))


def test_settings_of_pairs_are_refused(steps: MakeSteps, tmp_path: Path):
    with pytest.raises(DenserlError, match=r"reward_model.center_rewards: for preference pairs"):
        train(steps("reward_model.center_rewards=0.1"), tmp_path / "run")


def test_pairs_and_steps_in_one_recipe_are_refused(
    steps: MakeSteps, slots: SandboxFiles, tmp_path: Path
):
    with pytest.raises(DenserlError, match=r"steps.jsonl has steps .*preferences.jsonl has pref"):
        train(steps(f"data.evaluation=[{slots.preferences}]"), tmp_path / "run")


def test_the_notice_about_other_segments(shared: Path):
    from denserl_cli.core.chat.format import ChatFormat
    from denserl_cli.core.recipe.resolved import ResolvedSegmentation
    from tests.core.data.test_steps import encode, item
    from tests.core.fake_tokenizers import load

    tokenizer = load(shared / "tokenizers" / "llama3")
    rows = encode(ChatFormat.of(tokenizer), item("One. Two", "three."), item("Four\nfive", "six"))

    def said(cut: str, some: list) -> str | None:
        asked = ResolvedSegmentation(granularity="segment", cut=cut)
        return step_segments_notice(StepRows.of(some), asked, tokenizer)

    assert said("newline", rows[:1]) is None
    assert "1 of 2 responses" in said("newline", rows)
    assert "segmentation.cut=newline" in said("sentence", rows[:1])
