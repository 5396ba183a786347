"""What train-ppo leaves when it is stopped, and that it is all it needs."""

from __future__ import annotations

import math
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from denserl_cli.core.errors import DenserlError, Interrupted
from denserl_cli.core.ppo import rollout
from denserl_cli.core.sampling.sampler import Sampler
from tests.core.stages.test_train_ppo import copied, lines, outcome, train
from tests.core.test_surviving import changed, older, reseeded
from tests.fakes import InterruptingObserver, RecordingObserver

SETTINGS = ("ppo.iterations=3", "ppo.kl_target=0.01", "ppo.eval_every=1", "run.nonfinite=skip")


def signals_in_sampling(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """SIGTERM comes while the rollout of this number is sampled."""
    calls, real = [], Sampler.sample

    def sample(*words: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*words, **options)

    monkeypatch.setattr(Sampler, "sample", sample)


@pytest.mark.parametrize(
    ("number", "message", "code"),
    [(1, "stopped at once by SIGTERM", 143), (2, "stopped after iteration 0 of 3", 143),
     (4, "stopped after iteration 1 of 3", 75)],
)  # fmt: skip
def test_a_scheduler_stops_the_evaluation_before_and_the_sampling(
    scored: Path, monkeypatch: pytest.MonkeyPatch, number: int, message: str, code: int
):
    """Rollouts in order: evaluation, iteration 1, its evaluation, iteration 2.

    Before the first iteration has ended there is nothing that a requeued attempt would gain.
    """
    whole = copied(scored, "whole")
    train(whole, *SETTINGS)
    with monkeypatch.context() as patch:
        signals_in_sampling(patch, number)
        with pytest.raises(Interrupted, match=message) as caught:
            train(scored, *SETTINGS)
    assert caught.value.exit_code == code and not (scored / "lock").exists()
    train(scored, *SETTINGS, mode="resume")
    assert outcome(scored) == outcome(whole)


@pytest.fixture(scope="module")
def stopped(_scored: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run stopped after its second iteration; to be copied."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    shutil.copytree(_scored, folder)
    with pytest.raises(Interrupted):
        train(folder, *SETTINGS, observer=InterruptingObserver(2, "train the policy"))
    return folder


@pytest.fixture(scope="module")
def whole(stopped: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What is left when it is resumed as it is."""
    return resumed(stopped, tmp_path_factory.mktemp("whole") / "run", {})


def resumed(run: Path, target: Path, change: dict[tuple[str, ...], Any]) -> dict[str, Any]:
    """Resume a copy of a run whose checkpoint is changed before; returns all that can be seen."""
    shutil.copytree(run, target)
    (file,) = target.glob("checkpoints/*/step-00000002/state.pt")
    record = torch.load(file)
    for path, how in change.items():
        state = record["state"]
        for name in path[:-1]:
            state = state[name]
        state[path[-1]] = how(state[path[-1]]) if callable(how) else how
    torch.save(record, file)
    recorder = RecordingObserver()
    train(target, *SETTINGS, mode="resume", observer=recorder)
    random = torch.get_rng_state().tolist()
    notices = [notice.replace(str(target), "") for notice in recorder.notices]
    return {**outcome(target), "random": random, "notices": notices}


@pytest.mark.parametrize(
    "change",
    [
        {("actor", "model"): changed},
        {("actor", "optimizer", "state"): changed},
        {("actor", "schedule"): older},
        {("critic", "model"): changed},
        {("critic", "optimizer", "state"): changed},
        {("critic", "schedule"): older},
        {("random",): reseeded},
        {("kl_coef",): 0.5},
        {("best",): -math.inf},
        {("start_segments",): 1e-3},
        {("beyond",): True},
        {("guard",): {"total": 5, "in_a_row": 5}},
    ],
    ids=lambda change: "-".join(next(iter(change))),
)
def test_every_part_of_a_checkpoint_counts(
    stopped: Path, whole: dict[str, Any], tmp_path: Path, change: dict[tuple[str, ...], Any]
):
    assert resumed(stopped, tmp_path / "run", change) != whole


def test_a_warning_that_was_given_is_not_repeated(stopped: Path, tmp_path: Path):
    few = {("start_segments",): 1e-3}
    again = resumed(stopped, tmp_path / "a", few)["notices"]
    quiet = resumed(stopped, tmp_path / "b", {**few, ("warned",): True})["notices"]
    assert len(again) == len(quiet) + 1


# numbers that are not finite


def spoil(monkeypatch: pytest.MonkeyPatch, iteration: int) -> None:
    """One reward of one rollout is NaN."""
    calls, real = [], rollout.Collector.score

    def score(self: Any, *words: Any) -> Any:
        found = real(self, *words)
        calls.append(1)
        if len(calls) == iteration:
            found.token_values[0, 0] = math.nan
        return found

    monkeypatch.setattr(rollout.Collector, "score", score)


def test_a_rollout_with_a_nan_is_left_out(scored: Path, monkeypatch: pytest.MonkeyPatch):
    settings = ("data.eval_prompts=0", "run.nonfinite=skip", "ppo.kl_target=0.01")
    spoil(monkeypatch, 2)
    recorder = RecordingObserver()
    train(scored, *settings, observer=recorder)
    _, first, bad, third, last = lines(scored)
    counts = [line["skipped_updates"] for line in (first, bad, third, last)]
    assert counts == [0, 1, 1, 1]
    assert "policy_loss" in first and "policy_loss" not in bad and "policy_loss" in third
    assert math.isfinite(last["kl_coef"]) and math.isfinite(last["policy_loss"])
    assert [n for n in recorder.notices if "skipped" in n] == [
        "train-ppo step 2: a reward or log-probability is not finite; its update is skipped"
    ]


def test_by_default_it_stops(scored: Path, monkeypatch: pytest.MonkeyPatch):
    spoil(monkeypatch, 2)
    with pytest.raises(DenserlError, match="stopped at step 2: a reward or log-probability"):
        train(scored, "data.eval_prompts=0")
    assert (scored / "nonfinite" / "train-ppo-00000002" / "batch.pt").exists()
