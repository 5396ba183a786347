"""Numbers that are not finite, and memory that is not enough."""

import math
from pathlib import Path

import pytest
import torch

from denserl_cli.core.engine.base import NonFiniteError, step
from denserl_cli.core.engine.torch_engine import TorchEngine
from denserl_cli.core.errors import DenserlError
from denserl_cli.core.recipe import load_recipe
from denserl_cli.core.recipe.schema import OptimizerConfig
from denserl_cli.core.reward_model import trainer as reward_training
from denserl_cli.core.reward_model.trainer import RewardTrainer
from denserl_cli.core.runs.failures import MOST_SKIPS, NonFiniteGuard, memory_advice
from denserl_cli.core.runs.folder import RunFolder
from tests.core.conftest import MakeRecipe
from tests.core.reward_model.test_trainer import STEPS, metrics, nan_at, train, weights
from tests.fakes import RecordingObserver

BAD = NonFiniteError("the loss is nan")


def guard(folder: Path, how: str) -> NonFiniteGuard:
    recipe = load_recipe("sandbox-segment", [f"run.nonfinite={how}"])
    return NonFiniteGuard("train-rm", RunFolder(folder, recipe), RecordingObserver())


def batch() -> dict[str, torch.Tensor]:
    return {"ids": torch.arange(3)}


def test_a_stop_keeps_the_batch_and_says_where_it_is(tmp_path: Path):
    made = guard(tmp_path, "stop")
    with pytest.raises(DenserlError) as caught, made.update(4, batch):
        raise BAD
    place = tmp_path / "nonfinite" / "train-rm-00000004"
    message = f"train-rm stopped at step 4: the loss is nan; the batch is in {place}"
    assert caught.value.message == message and caught.value.exit_code == 2
    assert caught.value.hint and "run.nonfinite=skip" in caught.value.hint
    assert torch.load(place / "batch.pt")["ids"].tolist() == [0, 1, 2]
    assert made.metrics() == {}


def test_skips_are_counted_told_and_limited_in_a_row(tmp_path: Path):
    made = guard(tmp_path, "skip")
    for number in range(MOST_SKIPS):
        with made.update(number, batch):
            raise BAD
    with made.update(10, batch):  # a good one
        pass
    for number in range(MOST_SKIPS):
        with made.update(number, batch):
            raise BAD
    assert made.metrics() == {"skipped_updates": 2 * MOST_SKIPS}
    notices = made.observer.notices
    assert len(notices) == 2 * MOST_SKIPS
    assert notices[0] == "train-rm step 0: the loss is nan; its update is skipped"
    assert not (tmp_path / "nonfinite").exists()
    with pytest.raises(DenserlError, match="after 10 skipped updates in a row"):
        with made.update(21, batch):
            raise BAD
    assert (tmp_path / "nonfinite" / "train-rm-00000021" / "batch.pt").exists()


def test_other_errors_pass(tmp_path: Path):
    with pytest.raises(ZeroDivisionError), guard(tmp_path, "skip").update(1, batch):
        raise ZeroDivisionError


def test_the_counts_go_on_where_they_were(tmp_path: Path):
    made, again = guard(tmp_path, "skip"), guard(tmp_path, "skip")
    made.caught(1, BAD, batch)
    again.restore(made.state())
    assert (again.total, again.in_a_row) == (1, 1)


# both models or none


def engine(weight: float) -> TorchEngine:
    layer = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(layer.weight, weight)
    return TorchEngine(
        layer,
        learning_rate=0.1,
        settings=OptimizerConfig(warmup_ratio=0.0),
        total_steps=10,
        compute_dtype=torch.float32,
    )


@pytest.mark.parametrize("bad", [0, 1])
def test_engines_step_together_or_not_at_all(bad: int):
    pair = [engine(3.0), engine(4.0)]
    for number, one in enumerate(pair):
        scale = math.nan if number == bad else 1.0
        one.backward(scale * one.model.weight.sum())
    with pytest.raises(NonFiniteError):
        step(*pair)
    assert [one.model.weight.item() for one in pair] == [3.0, 4.0]
    assert all(one.model.weight.grad is None and one.schedule.last_epoch == 0 for one in pair)
    for one in pair:
        one.backward(one.model.weight.sum())
    assert [norm.item() for norm in step(*pair)] == [1.0, 1.0]
    moved = [one.model.weight.item() for one in pair]
    assert moved == pytest.approx([2.9, 3.9])  # Adam's first step, of nothing that was bad


def test_an_infinite_loss_with_a_finite_gradient_is_caught():
    one = engine(3.0)
    one.backward(one.model.weight.sum() + math.inf)
    with pytest.raises(NonFiniteError, match="the loss is inf"):
        step(one)
    assert one.model.weight.item() == 3.0
    one.backward(one.model.weight.sum())
    step(one)


# in train-rm


def test_a_skipped_step_is_recorded_and_the_others_go_on(
    recipe: MakeRecipe, trained: Path, tmp_path: Path, monkeypatch
):
    folder, recorder = tmp_path / "run", RecordingObserver()
    with monkeypatch.context() as patch:
        patch.setattr(RewardTrainer, "forward", nan_at(4, RewardTrainer.forward))
        train(recipe("run.nonfinite=skip"), folder, observer=recorder)
    lines = metrics(folder)
    assert [line["skipped_updates"] for line in lines] == [0, 0, 0, 1, 1, 1, 1]
    assert lines[3]["loss"] is None and lines[3]["gradient_norm"] is None
    assert sum("its update is skipped" in notice for notice in recorder.notices) == 1
    assert [line["loss"] for line in lines[:3]] == [line["loss"] for line in metrics(trained)[:3]]
    assert all(math.isfinite(line["loss"]) for line in lines[4:])
    assert weights(folder) != weights(trained) and len(lines) == STEPS


def test_more_than_ten_skips_in_a_row_stop(recipe: MakeRecipe, tmp_path: Path, monkeypatch):
    real = RewardTrainer.forward

    def forward(self, *given):
        metrics = real(self, *given)
        return {**metrics, "loss": metrics["loss"] * math.nan}

    monkeypatch.setattr(RewardTrainer, "forward", forward)
    with pytest.raises(DenserlError, match="stopped at step 11 after 10 skipped updates in a row"):
        train(recipe("run.nonfinite=skip", "reward_model.epochs=2"), tmp_path / "run")


def test_a_run_stopped_by_nan_goes_on_with_skip(recipe: MakeRecipe, tmp_path: Path, monkeypatch):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(RewardTrainer, "forward", nan_at(4, RewardTrainer.forward))
        with pytest.raises(DenserlError, match="stopped at step 4"):
            train(recipe(), folder)
    with monkeypatch.context() as patch:  # resumes after step 2: the second step from there
        patch.setattr(RewardTrainer, "forward", nan_at(2, RewardTrainer.forward))
        train(recipe("run.nonfinite=skip"), folder, "resume")
    assert metrics(folder)[-1]["skipped_updates"] == 1


# memory


@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        MemoryError(),
    ],
)
def test_running_out_of_memory_names_the_knobs(
    recipe: MakeRecipe, tmp_path: Path, monkeypatch, error: Exception
):
    def forward(*_: object) -> None:
        raise error

    monkeypatch.setattr(reward_training, "token_values", forward)
    with pytest.raises(DenserlError, match="train-rm ran out of memory: ") as caught:
        train(recipe("model.gradient_checkpointing=false"), tmp_path / "run")
    hint = caught.value.hint
    assert hint and caught.value.exit_code == 2
    for knob in (
        "reward_model.micro_batch_size (4)",
        "data.max_length (256)",
        "model.gradient_checkpointing=true (false)",
        "lora={} (null)",
    ):
        assert knob in hint
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("stage", "knobs"),
    [
        ("fit-function", ["normalizer.batch_size (8)", "data.max_length (2048)"]),
        (
            "train-ppo",
            [
                "ppo.micro_batch_size (7)",
                "ppo.rollout.micro_batch_size (16)",
                "ppo.rollout.max_new_tokens (1024)",
                "ppo.max_prompt_length (1024)",
            ],
        ),
        ("evaluate-rm", ["lower reward_model.micro_batch_size (8), data.max_length (2048)"]),
        (
            "evaluate-policy",
            ["lower ppo.rollout.micro_batch_size (16), ppo.rollout.max_new_tokens (1024)"],
        ),
    ],
)
def test_each_stage_names_its_own(stage: str, knobs: list[str], tmp_path: Path):
    (tmp_path / "r.yaml").write_text(
        "model: {path: a/b, gradient_checkpointing: true}\nlora: {}\n"
        "segmentation: {cutoff: 1.0}\nppo: {micro_batch_size: 7, train_batch_size: 14,"
        " rollout: {batch_size: 14}}\n"
    )
    recipe = load_recipe(str(tmp_path / "r.yaml"))
    with pytest.raises(DenserlError) as caught, memory_advice(stage, recipe):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
    hint = caught.value.hint or ""
    assert all(knob in hint for knob in knobs)
    assert "gradient_checkpointing" not in hint and "lora" not in hint


def test_other_errors_of_torch_stay_bugs(tmp_path: Path):
    with pytest.raises(RuntimeError, match="shapes"):
        with memory_advice("train-rm", load_recipe("sandbox-segment")):
            raise RuntimeError("shapes do not match")


def test_after_it_smaller_micro_batches_resume(recipe: MakeRecipe, tmp_path: Path, monkeypatch):
    folder, calls, real = tmp_path / "run", [], reward_training.token_values

    def forward(*words):
        calls.append(1)
        if len(calls) == 10:  # two micro-batches a step: in the fifth
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return real(*words)

    with monkeypatch.context() as patch:
        patch.setattr(reward_training, "token_values", forward)
        with pytest.raises(DenserlError, match="out of memory"):
            train(recipe(), folder)
    recorder = RecordingObserver()
    train(recipe("reward_model.micro_batch_size=1"), folder, "resume", recorder)
    assert f"resuming after step 4 of {STEPS}" in recorder.notices
