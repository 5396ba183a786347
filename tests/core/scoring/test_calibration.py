"""`cutoff: auto`: one number a run, found before training and used by everything after it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from denserl_cli.core.errors import DenserlError, Interrupted
from denserl_cli.core.inspection.inspector import Inspector, answers_of
from denserl_cli.core.models.reward_metadata import RewardRecord
from denserl_cli.core.observer import Observer
from denserl_cli.core.recipe import Recipe
from denserl_cli.core.runs.folder import RunFolder
from denserl_cli.core.sandbox.files import SandboxFiles
from denserl_cli.core.scoring import calibration as cutoffs
from denserl_cli.core.scoring.calibration import sample_pairs, with_calibrated_cutoff
from denserl_cli.core.stages.export import export
from denserl_cli.core.stages.run import run_stage
from tests.core.conftest import MakeRecipe
from tests.core.scoring.test_resolve import PPO, published
from tests.fakes import RecordingObserver

AUTO = ("segmentation.cutoff=auto", "segmentation.segment_length=3")
SHORT = ("reward_model.epochs=0.5", "reward_model.save_every=1")


@pytest.fixture(scope="module")
def calibrated(recipe: MakeRecipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that found its cutoff and trained a reward model with it; to be read."""
    folder = tmp_path_factory.mktemp("calibrated") / "run"
    run_stage("train-rm", recipe(*AUTO, *SHORT), folder, "start", Observer())
    return folder


@pytest.fixture
def run(calibrated: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(calibrated, tmp_path / "run"))


def recorded(folder: Path) -> float:
    return json.loads((folder / "cutoff.json").read_text())["cutoff"]


def settle(recipe: Recipe, folder: Path, recorder: Observer | None = None) -> Recipe:
    return with_calibrated_cutoff(recipe, RunFolder(folder, recipe), recorder or Observer())


def test_every_stage_uses_the_one_number(recipe: MakeRecipe, run: Path, tmp_path: Path):
    asked, cutoff = recipe(*AUTO, *SHORT, *PPO), recorded(run)
    assert 0 < cutoff < 5
    assert RewardRecord.load(run / "reward_model").cutoff == cutoff
    (run / "cutoff.json").unlink()  # from now on the reward model knows
    for stage in ("fit-function", "train-ppo"):
        run_stage(stage, asked, run, "start", Observer())
    normalizer = json.loads((run / "reward_model" / "normalizer.json").read_text())
    assert normalizer["record"]["cutoff"] == cutoff
    assert not (run / "cutoff.json").exists()
    inspector = Inspector(asked, RunFolder(run, asked), Observer())
    assert inspector.recipe.segmentation.cutoff == inspector.scorer.cut.cutoff == cutoff
    export("reward-model", asked, RunFolder(run, asked), tmp_path / "card", replace=False)
    card = (tmp_path / "card" / "README.md").read_text()
    assert f"cutoff: {cutoff}" in card and "cutoff: auto" not in card


def test_the_number_is_that_of_segment_calibrate(recipe: MakeRecipe, calibrated: Path):
    asked = recipe("segmentation.cutoff=0.0")
    inspector = Inspector(asked, RunFolder(calibrated, asked), Observer(), rewards=False)
    answers = answers_of(asked, cutoffs.PAIRS, Observer())
    assert inspector.calibrate(answers, 3.0).cutoff == recorded(calibrated)
    found = json.loads((calibrated / "cutoff.json").read_text())
    at_number = recipe(f"segmentation.cutoff={found['cutoff']}")
    other = Inspector(at_number, RunFolder(calibrated, at_number), Observer(), rewards=False)
    segments = [s for response in other.segment(answers) for s in response.segments]
    lengths = [s.end + 1 - s.start for s in segments]
    assert found["segment_length"] == pytest.approx(np.mean(lengths))
    assert found["responses"] == len(answers)


def test_segments_can_be_seen_before_training(recipe: MakeRecipe, tmp_path: Path):
    asked, recorder = recipe(*AUTO), RecordingObserver()
    for _ in range(2):
        inspector = Inspector(asked, RunFolder(tmp_path / "run", asked), recorder)
    assert inspector.scorer.cut.cutoff == recorded(tmp_path / "run")
    told = [notice for notice in recorder.notices if "auto is" in notice]
    assert len(told) == 1 and f"{recorded(tmp_path / 'run'):.4f} nats" in told[0]
    before = (tmp_path / "run" / "cutoff.json").read_bytes()
    run_stage("train-rm", recipe(*AUTO, *SHORT), tmp_path / "run", "start", recorder)
    assert (tmp_path / "run" / "cutoff.json").read_bytes() == before


def test_other_settings_find_another_cutoff(recipe: MakeRecipe, run: Path, tmp_path: Path):
    changed = recipe(*AUTO, *SHORT, "segmentation.segment_length=1.5")
    with pytest.raises(DenserlError, match=r"segment_length was 3\.0, is 1\.5"):
        run_stage("train-rm", changed, run, "start", Observer())
    with pytest.raises(DenserlError, match=r"segment_length is 1\.5, .* calibrated for 3\.0"):
        run_stage("fit-function", changed, run, "start", Observer())
    old = recorded(run)
    run_stage("train-rm", changed, run, "fresh", Observer())
    assert RewardRecord.load(run / "reward_model").cutoff == recorded(run) < old
    # other data than the reward model's may be given to later stages
    pairs = tmp_path / "pairs.jsonl"
    row = {"prompt": "write words", "chosen": "words about", "rejected": "write"}
    pairs.write_text("".join(json.dumps(row) + "\n" for _ in range(12)))
    other = recipe(*AUTO, "segmentation.segment_length=1.5", f"data.preferences=[{pairs}]")
    assert Inspector(other, RunFolder(run, other), Observer()).scorer.cut.cutoff == recorded(run)


def test_a_resumed_training_equals_an_uninterrupted_one(
    recipe: MakeRecipe, calibrated: Path, tmp_path: Path
):
    asked, folder = recipe(*AUTO, *SHORT), tmp_path / "run"

    def interrupt(done: int) -> None:
        if done == 1:
            raise Interrupted("enough")

    with pytest.raises(Interrupted):
        run_stage("train-rm", asked, folder, "start", RecordingObserver(interrupt))
    run_stage("train-rm", asked, folder, "resume", Observer())
    assert recorded(folder) == recorded(calibrated)
    ours, theirs = (
        load_file(place / "reward_model" / "model.safetensors") for place in (folder, calibrated)
    )
    assert all((ours[name] == theirs[name]).all() for name in theirs)


def test_a_published_model_brings_its_cutoff(recipe: MakeRecipe, run: Path, tmp_path: Path):
    made, cutoff = run / "reward_model", recorded(run)
    cut = f"granularity: segment, cutoff: {cutoff}"
    asked = recipe(*AUTO, published(made, cut))
    assert settle(asked, tmp_path / "new").segmentation.cutoff == cutoff
    assert not (tmp_path / "new").exists()


def test_what_is_a_number_stays(recipe: MakeRecipe, tmp_path: Path):
    asked = recipe()
    assert settle(asked, tmp_path / "run") is asked


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"cutoff": null}', '{"cutoff": NaN}'])
def test_a_damaged_file_is_made_again(
    recipe: MakeRecipe, run: Path, content: str, monkeypatch: pytest.MonkeyPatch
):
    calls = []
    monkeypatch.setattr(
        cutoffs, "calibrate", lambda *a, **k: calls.append(a) or cutoffs.Calibration(1.25, 3.0)
    )
    (run / "cutoff.json").write_text(content)
    asked = recipe(*AUTO, *SHORT)
    assert settle(asked, run).segmentation.cutoff == 1.25 == recorded(run)
    assert settle(asked, run).segmentation.cutoff == 1.25 and len(calls) == 1


def test_without_pairs_there_is_nothing_to_calibrate_on(recipe: MakeRecipe, tmp_path: Path):
    asked = recipe(*AUTO, "data.preferences=[]")
    with pytest.raises(DenserlError, match="needs preference pairs") as caught:
        settle(asked, tmp_path / "run")
    assert caught.value.hint and "--set segmentation.cutoff=" in caught.value.hint


@pytest.mark.parametrize("granularity", ["token", "bandit"])
def test_other_granularities_have_no_cutoff(recipe: MakeRecipe, granularity: str):
    with pytest.raises(DenserlError, match="has no cutoff"):
        recipe("segmentation.cutoff=auto", f"segmentation.granularity={granularity}")


def test_pairs_are_drawn_from_all_sources(recipe: MakeRecipe, slots: SandboxFiles, tmp_path: Path):
    other = Path(shutil.copy(slots.preferences, tmp_path / "other.jsonl"))
    asked = recipe(f"data.preferences=[{slots.preferences}, {other}]")
    origins = [pair.origin for pair in sample_pairs(asked, 10, Observer())]
    assert len(origins) == 10
    assert sum(origin.startswith(str(other)) for origin in origins) == 5
