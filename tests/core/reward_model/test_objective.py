"""The objective of a recipe, checked against its pairs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from denserl_cli.core.data.arrow_rows import PairRows
from denserl_cli.core.data.batches import EncodedPairRow
from denserl_cli.core.errors import DenserlError
from denserl_cli.core.observer import Observer
from denserl_cli.core.recipe.schema import RewardModelConfig
from denserl_cli.core.reward_model.loss import PreferenceObjective
from denserl_cli.core.reward_model.objective import objective_of
from denserl_cli.core.stages.run import run_stage
from tests.core.conftest import MakeRecipe


def pairs(*margins: float | None) -> PairRows:
    ids = [np.array([number], np.int32) for number in (1, 2, 3)]
    return PairRows.of(EncodedPairRow(*ids, margin, "file:1") for margin in margins)


def test_the_default_is_the_plain_loss():
    assert objective_of(RewardModelConfig(), [pairs(-1.0, None)]) == PreferenceObjective()


def test_margins_as_weights_must_be_there_and_not_negative():
    settings = RewardModelConfig(margins="weight")
    assert objective_of(settings, [pairs(2.0, None), pairs(0.0)]).margins == "weight"
    with pytest.raises(DenserlError, match="no pair has a margin"):
        objective_of(settings, [pairs(None, None), pairs()])
    with pytest.raises(DenserlError, match="1 pairs have a negative margin"):
        objective_of(settings, [pairs(1.0), pairs(-2.0)])


def test_every_option_trains(recipe: MakeRecipe, tmp_path: Path):
    options = (
        *("temperature=0.5", "target_margin=0.2", "label_smoothing=0.1", "center_rewards=0.01"),
        *("save_every=100", "eval_every=100"),
    )
    losses = []
    for name, settings in (("plain", ()), ("options", options)):
        folder = tmp_path / name
        made = recipe(*(f"reward_model.{setting}" for setting in settings))
        run_stage("train-rm", made, folder, "start", Observer())
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        first, last = json.loads(lines[0]), json.loads(lines[-1])
        assert np.isfinite(last["eval_loss"]) and last["eval_accuracy"] > 0
        losses.append((first["loss"], first["accuracy"]))
    (plain, before), (other, same) = losses
    assert before == same and plain != other
