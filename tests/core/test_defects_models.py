"""Known defects of the authors' code (method §7) that concern models, recipes and rollouts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from denserl_cli.core.normalizer import LocationNormalizer
from denserl_cli.core.ppo.sampling import Sampling, sample
from denserl_cli.core.recipe import load_recipe
from tests import tiny

END = 3


class Script:
    """A policy that says what it is told: row r says `words[r]`, whatever came before."""

    device = torch.device("cpu")
    config = None

    def __init__(self, words: list[list[int]], vocabulary: int) -> None:
        self.words, self.vocabulary, self.step = dict(enumerate(words)), vocabulary, 0

    def __call__(self, input_ids: torch.Tensor, **_: object) -> object:
        self.words = {row: said for row, said in self.words.items() if len(said) > self.step}
        logits = torch.full((len(input_ids), 1, self.vocabulary), -1e9)
        for place, said in enumerate(self.words.values()):
            logits[place, 0, said[self.step]] = 0.0
        self.step += 1
        return type("Output", (), {"logits": logits})


def test_defect_3_a_row_does_not_end_where_the_first_row_does(monkeypatch) -> None:
    """Their Llama path cuts the mask of the whole batch at the first row's terminator."""
    cache = type("Cache", (), {"reorder_cache": lambda self, rows: None})
    monkeypatch.setattr("transformers.DynamicCache", lambda config: cache())
    said = [[5, END], [6, 7, 6, 7, END], [8, 9, 8]]
    sampling = Sampling(max_new_tokens=5, stop_ids=(END,))
    policy = Script([*said[:2], [*said[2], 8, 9]], vocabulary=10)
    drawn = sample(
        policy, [np.array([1])] * 3, sampling, torch.full((3, 5), 0.5).double(), pad_id=0
    )
    assert [response.ids.tolist() for response in drawn] == [*said[:2], [8, 9, 8, 8, 9]]
    assert [response.terminated for response in drawn] == [True, True, False]


def test_defect_6_a_name_switches_nothing() -> None:
    """Their run names turn penalties and normalisation on and off."""
    plain = load_recipe("sandbox-segment")
    named = load_recipe(
        "sandbox-segment", ["name=no_normalization_length_norm_end_penalty_m0d05_800"]
    )
    assert replace(named, name=plain.name) == plain


def test_defect_17_statistics_are_in_a_file_and_not_in_the_weights(scored: Path) -> None:
    """Their mean and std are buffers that transformers leaves uninitialised."""
    weights = load_file(scored / "reward_model" / "model.safetensors")
    assert {name.split(".")[0] for name in weights} == {"model", "score"}
    assert not [name for name in weights if name.endswith(("mean", "std"))]
    once, again = (LocationNormalizer.load(scored / "reward_model/normalizer.json") for _ in "ab")
    assert once == again and once.b_std > 0
    assert tiny.recipe().normalizer.kind == "location"
