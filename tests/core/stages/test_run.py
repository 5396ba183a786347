"""From the name of a stage to the stage."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest

from denserl_cli.core.errors import DenserlError
from denserl_cli.core.runs.folder import RunFolder
from denserl_cli.core.stages import run as stages
from tests import tiny
from tests.fakes import RecordingObserver


@pytest.mark.parametrize(
    ("stage", "function"),
    [
        ("train-rm", "denserl_cli.core.stages.train_rm.train_reward_model"),
        ("fit-function", "denserl_cli.core.stages.fit_function.fit_normalizer"),
        ("train-ppo", "denserl_cli.core.stages.train_ppo.train_policy"),
    ],
)
def test_a_stage_runs_with_its_recipe_and_folder(
    stage: str, function: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    given: list[tuple] = []
    monkeypatch.setattr(function, lambda *words: given.append(words))
    recipe, observer = tiny.recipe(), RecordingObserver()
    stages.run_stage(stage, recipe, tmp_path / "run", "fresh", observer)
    ((found, run, mode, seen),) = given
    assert (found, run.path, mode, seen) == (recipe, tmp_path / "run", "fresh", observer)


def test_a_finished_stage_is_left_alone_without_loading_anything(
    scored: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(stages, "stage_function", lambda _: pytest.fail("not to be run"))
    recorder = RecordingObserver()
    stages.run_stage("train-rm", tiny.recipe(), scored, "start", recorder)
    assert recorder.notices == [
        f"train-rm in {scored} is finished; nothing to do (--fresh does it again)"
    ]


def test_other_settings_are_refused(scored: Path):
    with pytest.raises(DenserlError, match="under other settings: seed was 42, is 7"):
        stages.run_stage("train-rm", tiny.recipe("seed=7"), scored, "resume", RecordingObserver())
    assert RunFolder(scored, tiny.recipe()).summary("train-rm")


def test_the_libraries_keep_quiet():
    import transformers

    stages.quiet_libraries()
    assert transformers.logging.get_verbosity() == logging.ERROR


def test_deepspeed_leaves_stdout_to_results(capsys: pytest.CaptureFixture[str]):
    stages.quiet_libraries()
    logger = logging.getLogger("DeepSpeed")
    handler = logging.StreamHandler(sys.stdout)  # what its import does
    logger.setLevel(logging.WARNING)
    logger.addHandler(handler)
    try:
        logger.warning("Setting accelerator to CPU")
        assert capsys.readouterr().out == ""
        logger.error("broken")
        assert capsys.readouterr().out == "broken\n"
    finally:
        logger.removeHandler(handler)
