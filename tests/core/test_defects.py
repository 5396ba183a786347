"""The known defects of the authors' released code that concern the maths (method §7), one by one.

The numbers are the method's. Those about data, chat formatting and loading are tested where those
modules are.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from denserl_cli.core.errors import DenserlError
from denserl_cli.core.likelihood import logprob_and_entropy
from denserl_cli.core.normalizer import LocationNormalizer
from denserl_cli.core.ppo.advantages import whiten
from denserl_cli.core.ppo.losses import clipped_policy_loss, clipped_value_loss, masked_mean
from denserl_cli.core.ppo.rewards import penalize_kl, replace_penalized, spread_rewards
from denserl_cli.core.segmentation import (
    aggregate_segments,
    calibrate_cutoff,
    segment_ends,
    segment_ids,
)


@pytest.mark.parametrize("prompt_width", [0, 4, 224])
def test_defect_1_the_length_limit_does_not_move_with_the_prompt(prompt_width):
    """800 tokens pass and 801 do not, wherever the response stands in its window."""
    lengths = torch.tensor([800, 801])
    column = torch.arange(prompt_width + 805)
    mask = (column >= prompt_width) & (column < prompt_width + lengths[:, None])
    rewards = replace_penalized(
        mask.float(),
        mask,
        torch.tensor([True, True]),
        max_response_tokens=800,
        overlong_penalty=-0.05,
    )
    assert torch.equal(rewards[0], mask[0].float())
    assert torch.equal(rewards[1], mask[1] * -0.05)


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_defect_2_the_bandit_score_goes_to_the_last_token_for_any_shape(rows):
    """Recorded with B = T = 2: the scores (2, -1) land in columns; with B = 1 on every token."""
    scores = torch.tensor([2.0, -1.0, 3.0])[:rows]
    lengths = torch.tensor([3, 2, 1])[:rows]
    mask = torch.arange(3) < lengths[:, None]
    ends = segment_ends(torch.zeros(rows, 3), mask, granularity="bandit")
    values = scores[:, None].expand(rows, 3)
    rewards = spread_rewards(values, ends, mask, interpolation="end")
    logprobs, reference = torch.full((rows, 3), -1.0), torch.full((rows, 3), -1.5)
    rewards = penalize_kl(rewards, logprobs, reference, mask, 0.1)
    expected = torch.tensor([[-0.05, -0.05, 1.95], [-0.05, -1.05, 0.0], [2.95, 0.0, 0.0]])[:rows]
    torch.testing.assert_close(rewards, expected)


def test_defect_5_missing_coefficients_are_an_error(tmp_path):
    """The reference goes on without normalisation."""
    with pytest.raises(DenserlError) as caught:
        LocationNormalizer.load(tmp_path / "normalizer.json")
    assert f"no normalizer at {tmp_path}" in caught.value.message
    assert "denserl fit-function" in caught.value.hint


@pytest.mark.parametrize("granularity", ["segment", "token", "bandit"])
@pytest.mark.parametrize("terminated", [True, False])
def test_defect_7_a_one_token_response_is_its_own_segment(granularity, terminated):
    """The reference puts its end at position -1, that is on the prompt, and drops the reward."""
    mask = torch.tensor([[False, True, False]])
    ends = segment_ends(
        torch.full((1, 3), 9.0),
        mask,
        granularity=granularity,
        cutoff=1.75,
        terminated=torch.tensor([terminated]),
    )
    assert torch.equal(ends, mask)
    values = torch.tensor([[7.0, 2.0, 7.0]])
    assert spread_rewards(values, ends, mask).tolist() == [[0, 2, 0]]
    assert aggregate_segments(values, ends).tolist() == [2]


def test_defect_8_the_std_never_reaches_zero():
    """Published LLaMA3-SFT-v2 token coefficients: the std is 0 at p = 0.0041, 246 segments."""
    normalizer = LocationNormalizer(1.7340, 0.9906, 1.3212, 5.4513)
    p = 1 / torch.arange(1.0, 2000.0)
    assert (0.9906 * p.log() + 5.4513).min() < 0
    assert normalizer.std(p).min().item() == pytest.approx(0.54513)

    mask = torch.ones(1, 301, dtype=torch.bool)
    ends = segment_ends(torch.ones(1, 301), mask, granularity="token")
    worse, better = torch.full((1, 301), -1.0), torch.full((1, 301), 1.0)
    settings = {"normalizer": normalizer, "clip": math.inf}
    gain = spread_rewards(better, ends, mask, **settings) - spread_rewards(
        worse, ends, mask, **settings
    )
    assert (gain[ends] > 0).all()  # a better value is never punished


class Operations(TorchDispatchMode):
    """Notes every operation that reaches the dispatcher."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("granularity", ["segment", "token", "bandit"])
def test_defect_9_segmentation_asks_for_no_single_elements(granularity):
    """No loop over tokens or rows, no .item(). Full logits: see test_likelihood."""

    def operations(rows, tokens):
        entropy = torch.linspace(0, 4, rows * tokens).view(rows, tokens)
        mask = torch.ones(rows, tokens, dtype=torch.bool)
        with Operations() as seen:
            ends = segment_ends(entropy, mask, granularity=granularity, cutoff=2.0)
            segment_ids(ends, mask)
            spread_rewards(entropy, ends, mask, normalizer=LocationNormalizer(1, 1, 1, 1))
        return seen.names

    few, many = operations(2, 3), operations(16, 500)
    assert few == many
    assert not any("_local_scalar_dense" in name or "nonzero" in name for name in many)


def test_defect_10_logits_are_float32_whatever_the_weights_are():
    """bfloat16 logits err by hundredths of a nat, in float32 sums over them as well."""
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(256, 64, generator=generator).bfloat16()
    weight = (torch.randn(500, 64, generator=generator) / 3).bfloat16()
    exact = (hidden.double() @ weight.double().T).softmax(-1)
    exact = torch.special.entr(exact).sum(-1)
    _, entropy = logprob_and_entropy(hidden, weight, torch.zeros(256, dtype=torch.long))
    rounded = torch.special.entr((hidden @ weight.T).float().softmax(-1)).sum(-1)
    assert (entropy - exact).abs().max() < 1e-5
    assert (rounded - exact).abs().max() > 1e-3


def test_defect_11_token_means_every_token():
    """A token whose entropy is exactly 0 is its own segment; the reference merges it."""
    entropy = torch.tensor([[2.0, 0.0, 1.0, 0.0, 3.0]])
    mask = torch.ones(1, 5, dtype=torch.bool)
    every = segment_ends(entropy, mask, granularity="token")
    assert every.tolist() == [[True, True, True, True, False]]
    merged = segment_ends(entropy, mask, granularity="segment", cutoff=0.0)
    assert merged.tolist() == [[True, False, True, True, False]]


def test_defect_12_a_missing_terminator_is_penalised_in_every_mode_and_nowhere_else():
    """Recorded, bandit: rewards (3, 3) for [False, True]; dense: -0.05 in masked columns too."""
    terminated = torch.tensor([False, True])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    bandit = torch.tensor([[0.0, 3.0, 0.0], [0.0, 0.0, 3.0]])
    ours = replace_penalized(
        bandit, mask, terminated, missing_eos_penalty=-0.05, last_token_only=True
    )
    torch.testing.assert_close(ours, torch.tensor([[0.0, -0.05, 0.0], [0.0, 0.0, 3.0]]))
    dense = replace_penalized(mask * 1.0, mask, terminated, missing_eos_penalty=-0.05)
    torch.testing.assert_close(dense, torch.tensor([[-0.05, -0.05, 0.0], [1.0, 1.0, 1.0]]))


@pytest.mark.parametrize("rows", [1, 3])
def test_defect_15_empty_masks_and_single_rows_give_numbers(rows):
    """The reference: NaN from an empty row, an IndexError from an empty mask or a single row."""
    empty = torch.zeros(rows, 4, dtype=torch.bool)
    numbers = torch.linspace(-1, 1, rows * 4).view(rows, 4)
    ends = segment_ends(numbers, empty, granularity="segment", cutoff=0.5)
    assert not ends.any()
    results = [
        spread_rewards(numbers, ends, empty, normalizer=LocationNormalizer(1, 1, 1, 1)),
        aggregate_segments(numbers, ends),
        whiten(numbers, empty),
        masked_mean(numbers, empty, "sequence"),
        masked_mean(numbers, empty, "token"),
        clipped_policy_loss(numbers, -numbers, numbers, empty, clip=0.2).loss,
        clipped_value_loss(numbers, -numbers, numbers, empty, clip=0.2).loss,
    ]
    for result in results:
        assert torch.equal(result, torch.zeros_like(result))
    overlong = replace_penalized(
        numbers,
        ~empty,
        torch.ones(rows, dtype=torch.bool),
        max_response_tokens=1,
        overlong_penalty=-1.0,
    )
    assert torch.equal(overlong, torch.full((rows, 4), -1.0))  # all rows over-long
    with pytest.raises(DenserlError, match="no response tokens"):
        calibrate_cutoff(numbers, empty, 2.0)
