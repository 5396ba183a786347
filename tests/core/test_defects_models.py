"""Known defects of the authors' code (method §7) that concern models, recipes and rollouts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from safetensors.torch import load_file

from denserl_cli.core.normalizer import LocationNormalizer
from denserl_cli.core.recipe import load_recipe
from denserl_cli.core.sampling.base import Sampling
from tests import tiny

END = 3


def test_defect_3_a_row_does_not_end_where_the_first_row_does() -> None:
    """Their Llama path cuts the mask of the whole batch at the first row's terminator."""
    sampler = tiny.sampler(tiny.causal_lm())
    prompts, keys = [np.array([1])] * 8, [(0, row) for row in range(8)]
    together = sampler.sample(prompts, keys, sampling := Sampling(12, stop_ids=(END,)))
    first = next(row for row, response in enumerate(together) if response.terminated)
    assert any(len(response.ids) > len(together[first].ids) for response in together)
    for prompt, key, response in zip(prompts, keys, together, strict=True):
        (alone,) = sampler.sample([prompt], [key], sampling)
        assert alone.ids.tolist() == response.ids.tolist()
        assert response.terminated == (END in response.ids)


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
