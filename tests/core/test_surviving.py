"""What train-rm and fit-function leave when they are stopped, and that it is all they need."""

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from denserl_cli.core.errors import DenserlError, Interrupted
from denserl_cli.core.observer import Observer
from denserl_cli.core.reward_model import trainer as reward_training
from denserl_cli.core.runs.folder import RunFolder
from denserl_cli.core.stages import fit_function as fitting
from denserl_cli.core.stages import train_rm
from denserl_cli.core.stages.run import run_stage
from tests.core.conftest import MakeRecipe
from tests.core.reward_model.test_trainer import STEPS, metrics, train, weights
from tests.fakes import RecordingObserver


def stops_after(step: int, number: signal.Signals = signal.SIGTERM) -> RecordingObserver:
    return RecordingObserver(lambda done: signal.raise_signal(number) if done == step else None)


@pytest.fixture(scope="module")
def stopped(recipe: MakeRecipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that SIGTERM stopped after step 3; to be copied."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.raises(Interrupted, match="stopped after step 3"):
        train(recipe(), folder, observer=stops_after(3))
    return folder


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_scheduler_stops_a_run_after_its_step(
    recipe: MakeRecipe, trained: Path, tmp_path: Path, number: signal.Signals
):
    folder = tmp_path / "run"
    with pytest.raises(Interrupted, match=f"stopped after step 3 of {STEPS}") as caught:
        train(recipe(), folder, observer=stops_after(3, number))
    assert caught.value.exit_code == 75
    train(recipe(), folder, "resume")
    assert weights(folder) == weights(trained) and metrics(folder) == metrics(trained)


def test_a_resumed_run_that_gets_no_further_is_not_requeued(
    recipe: MakeRecipe, stopped: Path, tmp_path: Path, monkeypatch
):
    """Checkpoints are there, but none that this attempt has written."""
    folder = shutil.copytree(stopped, tmp_path / "run")

    def signalled(*words: Any) -> Any:
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.raise_signal(number)

    monkeypatch.setattr(reward_training.RewardTrainer, "update", signalled)
    with pytest.raises(Interrupted) as caught:
        train(recipe(), folder, "resume")
    assert caught.value.exit_code == 143
    assert json.loads((folder / "run.json").read_text())["stages"]["train-rm"]["exit_code"] == 143


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_after_the_stage_is_finished_is_ignored(
    recipe: MakeRecipe, trained: Path, tmp_path: Path, number: signal.Signals
):
    """It comes while the result is shown, when run.json calls the stage finished."""

    class Late(Observer):
        def table(self, *words: Any) -> None:
            signal.raise_signal(number)

    folder = tmp_path / "run"
    train(recipe(), folder, observer=Late())
    entry = json.loads((folder / "run.json").read_text())["stages"]["train-rm"]
    assert (entry["status"], entry["exit_code"]) == ("finished", 0)
    assert weights(folder) == weights(trained)


def test_a_second_signal_loses_what_has_no_checkpoint(
    recipe: MakeRecipe, trained: Path, tmp_path: Path
):
    def twice(done: int) -> None:
        if done == 3:
            signal.raise_signal(signal.SIGUSR1)
            signal.raise_signal(signal.SIGTERM)

    folder, recorder = tmp_path / "run", RecordingObserver()
    with pytest.raises(Interrupted, match="stopped at once by SIGTERM") as caught:
        train(recipe(), folder, observer=RecordingObserver(twice))
    assert caught.value.exit_code == 75 and not (folder / "lock").exists()
    train(recipe(), folder, "resume", recorder)
    assert f"resuming after step 2 of {STEPS}" in recorder.notices
    assert weights(folder) == weights(trained)


@pytest.mark.parametrize("place", ["load_pairs", "seed_everything"])
def test_before_the_first_step_a_signal_breaks_nothing(
    recipe: MakeRecipe, trained: Path, tmp_path: Path, monkeypatch, place: str
):
    folder, real = tmp_path / "run", getattr(train_rm, place)

    def signalled(*words: Any, **options: Any) -> Any:
        signal.raise_signal(signal.SIGUSR1)
        return real(*words, **options)

    with monkeypatch.context() as patch:
        patch.setattr(train_rm, place, signalled)
        with pytest.raises(Interrupted, match="at once by SIGUSR1") as caught:
            train(recipe(), folder)
    assert caught.value.exit_code == 138  # nothing was gained: not to be requeued
    assert [path.name for path in folder.iterdir()] == []
    train(recipe(), folder, "resume")
    assert weights(folder) == weights(trained)


def test_a_signal_during_an_evaluation_waits_for_its_end(
    recipe: MakeRecipe, trained: Path, tmp_path: Path, monkeypatch
):
    folder, real = tmp_path / "run", reward_training.RewardTrainer.evaluate

    def signalled(self: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)
        return real(self)

    every = recipe("reward_model.eval_every=3")
    whole = train(every, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(reward_training.RewardTrainer, "evaluate", signalled)
        with pytest.raises(Interrupted, match="stopped after step 3") as caught:
            train(every, folder)
    assert caught.value.exit_code == 75
    train(every, folder, "resume")
    assert metrics(folder) == metrics(whole) and weights(folder) == weights(trained)


def test_a_signal_stops_a_fit_that_can_be_done_again(
    recipe: MakeRecipe, run_with_model: Path, monkeypatch
):
    real = fitting.segment_rewards

    def signalled(*words: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)
        return real(*words)

    with monkeypatch.context() as patch:
        patch.setattr(fitting, "segment_rewards", signalled)
        with pytest.raises(Interrupted) as caught:
            run_stage("fit-function", recipe(), run_with_model, "start", Observer())
    assert caught.value.exit_code == 143  # it has no checkpoints: not to be requeued
    assert not RunFolder(run_with_model, recipe()).normalizer.exists()
    run_stage("fit-function", recipe(), run_with_model, "resume", Observer())
    assert RunFolder(run_with_model, recipe()).normalizer.exists()


@pytest.mark.parametrize("stage", ["train-rm", "fit-function", "train-ppo"])
def test_a_folder_in_use_is_refused_by_every_stage(
    recipe: MakeRecipe, run_with_model: Path, stage: str
):
    before = sorted(run_with_model.rglob("*"))
    with RunFolder(run_with_model, recipe()).locked(Observer()):
        with pytest.raises(DenserlError, match="in use by process"):
            run_stage(stage, recipe(), run_with_model, "fresh", Observer())
    assert sorted(run_with_model.rglob("*")) == before


# a checkpoint holds all that matters


def changed(value: Any) -> Any:
    """Another value of the same kind."""
    if isinstance(value, dict):
        return {key: changed(inner) for key, inner in value.items()}
    if isinstance(value, torch.Tensor):
        return value + torch.ones_like(value) * (0.01 if value.is_floating_point() else 1)
    return value


def older(schedule: dict[str, Any]) -> dict[str, Any]:
    return {**schedule, "last_epoch": 0}


def reseeded(random: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**one, "torch": torch.Generator().manual_seed(99).get_state()} for one in random]


def left(folder: Path) -> dict[str, Any]:
    """What a run leaves, and where it leaves the generators."""
    return {
        "weights": weights(folder),
        "metrics": metrics(folder),
        "random": torch.get_rng_state().tolist(),
    }


def resumed(
    run: Path, target: Path, recipe: MakeRecipe, change: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Resume a copy of a run whose checkpoint is changed before."""
    shutil.copytree(run, target)
    (file,) = target.glob("checkpoints/*/step-00000003/state.pt")
    record = torch.load(file)
    change(record["state"])
    torch.save(record, file)
    train(recipe("run.nonfinite=skip"), target, "resume")
    return left(target)


@pytest.mark.parametrize(
    ("path", "change"),
    [
        (("engine", "model"), changed),
        (("engine", "optimizer", "state"), changed),
        (("engine", "schedule"), older),
        (("random",), reseeded),
        (("guard",), lambda counts: {"total": 5, "in_a_row": 5}),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else "",
)
def test_every_part_of_a_checkpoint_counts(
    recipe: MakeRecipe, stopped: Path, tmp_path: Path, path: tuple[str, ...], change: Callable
):
    def perturb(state: dict[str, Any]) -> None:
        *outer, last = path
        for name in outer:
            state = state[name]
        state[last] = change(state[last])

    whole = resumed(stopped, tmp_path / "whole", recipe, lambda _: None)
    assert whole != resumed(stopped, tmp_path / "other", recipe, perturb)
