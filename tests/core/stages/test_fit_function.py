import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from denserl_cli.core.data.batches import EncodedPairRow, SequenceBatch
from denserl_cli.core.errors import DenserlError
from denserl_cli.core.normalizer import LocationNormalizer, fit_location_normalizer
from denserl_cli.core.observer import Observer
from denserl_cli.core.recipe.stages import FIT_FUNCTION
from denserl_cli.core.runs.folder import RunFolder
from denserl_cli.core.scoring.resolve import load_normalizer
from denserl_cli.core.scoring.scorer import ScoredBatch
from denserl_cli.core.stages.fit_function import SegmentRewards, fit, segment_rewards
from denserl_cli.core.stages.run import run_stage
from tests.core.conftest import MakeRecipe
from tests.fakes import RecordingObserver

KINDS = ("location", "global", "last", "none")


def ids(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


# segments of responses


def row(chosen: np.ndarray, rejected: np.ndarray) -> EncodedPairRow:
    return EncodedPairRow(ids(1), chosen, rejected, None, "here")


class EvenIds:
    """Each even id ends a segment whose reward is the id."""

    def __init__(self, packs: bool) -> None:
        self.packs = packs

    def __call__(self, batch: SequenceBatch) -> ScoredBatch:
        assert (batch.packing is not None) == self.packs
        ends = batch.response_mask & (batch.responses % 2 == 0)
        return ScoredBatch(ends, None, None, batch.responses.float(), {})


@pytest.mark.parametrize("packs", [False, True])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_segments_of_both_answers_have_locations_and_rewards(batch_size: int, packs: bool):
    rows = [row(ids(2, 3, 4), ids(6)), row(ids(3, 8), ids(10, 12, 14, 16))]
    scorer = EvenIds(packs)
    found = segment_rewards(rows, scorer, batch_size, 0, Observer())  # type: ignore[arg-type]
    got = sorted(zip(found.reward, found.location, found.last, strict=True))
    assert got == [
        (2, 0.5, False), (4, 1, True), (6, 1, True), (8, 1, True),
        (10, 0.25, False), (12, 0.5, False), (14, 0.75, False), (16, 1, True),
    ]  # fmt: skip


# the four kinds

REWARDS = SegmentRewards(
    np.array([0.25, 0.5, 1.0, 0.25, 0.5, 1.0]),
    np.array([0.0, 1.0, 4.0, 2.0, 3.0, 8.0]),
    np.array([False, False, True, False, False, True]),
)


def test_location_is_a_line_over_log_p():
    normalizer, record = fit("location", REWARDS)
    assert normalizer == fit_location_normalizer(REWARDS.location, REWARDS.reward)
    assert record["table"] == [
        {"location": 0.25, "mean": 1.0, "std": 1.0, "count": 2},
        {"location": 0.5, "mean": 2.0, "std": 1.0, "count": 2},
        {"location": 1.0, "mean": 6.0, "std": 2.0, "count": 2},
    ]
    assert 0 < record["r2_mean"] <= 1 and 0 < record["r2_std"] <= 1


def test_a_constant_for_all_the_last_or_no_segments():
    everything, record = fit("global", REWARDS)
    assert (everything.mean(0.3), everything.std(0.3)) == (3.0, pytest.approx(math.sqrt(20 / 3)))
    assert record["kind"] == "global" and record["segments"] == 6 and "r2_mean" not in record
    last, _ = fit("last", REWARDS)
    assert (last.mean(0.3), last.std(1.0)) == (6.0, 2.0)
    none, _ = fit("none", REWARDS)
    assert (none.mean(0.3), none.std(0.3)) == (0.0, 1.0)


# the stage


def fitted(recipe, folder: Path, mode: str = "start", recorder: Observer | None = None) -> dict:
    run_stage(FIT_FUNCTION, recipe, folder, mode, recorder or Observer())  # type: ignore[arg-type]
    return json.loads((folder / "reward_model" / "normalizer.json").read_text())


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_leaves_its_file_a_plot_and_a_table(
    recipe: MakeRecipe, run_with_model: Path, kind: str
):
    asked, recorder = recipe(f"normalizer.kind={kind}"), RecordingObserver()
    content = fitted(asked, run_with_model, recorder=recorder)
    record = content["record"]
    assert record["kind"] == kind
    assert (record["granularity"], record["cutoff"]) == ("segment", 1.0)
    assert (record["pairs"], record["seed"]) == (24, 42)
    assert sum(line["count"] for line in record["table"]) == record["segments"]
    assert record["table"][-1]["location"] == 1 and record["table"][-1]["count"] == 48
    with Image.open(run_with_model / "reward_model" / "normalizer.png") as image:
        assert image.format == "PNG"
        image.load()
    assert "normaliser" in recorder.tables and f"kind {kind}" in recorder.tables
    assert ("r2_mean" in record) is (kind == "location")
    run = RunFolder(run_with_model, asked)
    summary = run.summary(FIT_FUNCTION)
    assert summary is not None and summary["segments"] == record["segments"]
    loaded = load_normalizer(asked, run)
    assert loaded is None if kind == "none" else loaded == LocationNormalizer.load(run.normalizer)
    assert not list(run.reward_model.glob(".*"))


def test_it_is_the_fit_of_the_reward_models_values(recipe: MakeRecipe, run_with_model: Path):
    table = fitted(recipe(), run_with_model)["record"]["table"]
    assert len(table) > 3
    content = fitted(recipe("normalizer.batch_size=1"), run_with_model, "fresh")
    for one, other in zip(table, content["record"]["table"], strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-5)


def test_the_floor_of_the_std_can_be_set(recipe: MakeRecipe, run_with_model: Path):
    plain = fitted(recipe(), run_with_model)
    assert plain["min_std"] == pytest.approx(0.1 * plain["b_std"])
    raised = fitted(recipe("normalizer.min_std=0.75"), run_with_model, "fresh")
    assert raised["min_std"] == 0.75 and raised["b_std"] == plain["b_std"]
    old = run_with_model / "replaced" / "reward_model" / "normalizer.json.1"
    assert json.loads(old.read_text()) == plain


def test_the_sample_is_as_large_as_asked_and_follows_its_seed(
    recipe: MakeRecipe, run_with_model: Path
):
    first = fitted(recipe(), run_with_model)
    again = fitted(recipe(), run_with_model, "fresh")
    assert first == again
    other = fitted(recipe("normalizer.seed=1"), run_with_model, "fresh")
    assert other["b_mean"] != first["b_mean"]
    everything = fitted(recipe("normalizer.pairs=1000"), run_with_model, "fresh")
    assert everything["record"]["pairs"] == 64


def test_values_that_are_not_finite_are_an_error(
    recipe: MakeRecipe, run_with_model: Path, monkeypatch
):
    def nan(model, batch, **_: bool) -> torch.Tensor:
        return torch.full(batch.response_mask.shape, math.nan)

    monkeypatch.setattr("denserl_cli.core.scoring.loading.token_values", nan)
    with pytest.raises(DenserlError, match="rewards are not finite"):
        fitted(recipe(), run_with_model)
    assert not (run_with_model / "reward_model" / "normalizer.json").exists()


def test_without_a_reward_model_nothing_is_written(recipe: MakeRecipe, tmp_path: Path):
    with pytest.raises(DenserlError, match="no reward model in") as caught:
        fitted(recipe(), tmp_path / "run")
    assert caught.value.hint and "train-rm" in caught.value.hint
    assert list(tmp_path.iterdir()) == []


# what PPO reads


def test_a_missing_normalizer_names_the_command(recipe: MakeRecipe, run_with_model: Path):
    run = RunFolder(run_with_model, recipe())
    with pytest.raises(DenserlError, match="no normalizer in") as caught:
        load_normalizer(recipe(), run)
    assert caught.value.hint == (
        f"run: denserl fit-function --recipe sandbox-segment --out {run_with_model}"
    )
    assert load_normalizer(recipe("normalizer.kind=none"), run) is None


def test_a_normalizer_of_something_else_is_an_error(recipe: MakeRecipe, run_with_model: Path):
    fitted(recipe(), run_with_model)
    run = RunFolder(run_with_model, recipe())
    assert load_normalizer(recipe(), run) is not None
    for settings, text in (
        (["normalizer.kind=global"], "kind location instead of global"),
        (["segmentation.cutoff=1.5"], "cutoff 1.0 instead of 1.5"),
        (
            ["segmentation.granularity=token", "segmentation.cutoff=null"],
            "granularity segment instead of token, cutoff 1.0 instead of None",
        ),
    ):
        with pytest.raises(DenserlError, match=f"was fitted for {text}") as caught:
            load_normalizer(recipe(*settings), run)
        assert caught.value.hint and "fit-function" in caught.value.hint


@pytest.mark.parametrize("damage", ["{", "[]", "{}", '{"schema": 1}'])
def test_a_damaged_normalizer_is_one_error(recipe: MakeRecipe, run_with_model: Path, damage: str):
    run = RunFolder(run_with_model, recipe())
    run.normalizer.write_text(damage)
    with pytest.raises(DenserlError, match=r"normalizer\.json: "):
        load_normalizer(recipe(), run)


def test_a_normalizer_without_its_record_fits_nothing(recipe: MakeRecipe, run_with_model: Path):
    run = RunFolder(run_with_model, recipe())
    LocationNormalizer(0.0, 0.0, 0.0, 1.0).save(run.normalizer)
    content = json.loads(run.normalizer.read_text())
    del content["record"]
    run.normalizer.write_text(json.dumps(content))
    with pytest.raises(DenserlError, match="kind None instead of location"):
        load_normalizer(recipe(), run)
