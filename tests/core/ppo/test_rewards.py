from __future__ import annotations

import math

import pytest
import torch

from denserl_cli.core.errors import DenserlError
from denserl_cli.core.normalizer import LocationNormalizer
from denserl_cli.core.ppo.rewards import (
    AdaptiveKL,
    penalize_kl,
    replace_penalized,
    spread_rewards,
)
from denserl_cli.core.segmentation import aggregate_segments, segment_ends

# Six tokens: a segment of two, one of three, the terminator; then one masked column.
MASK = torch.tensor([[1, 1, 1, 1, 1, 1, 0]]).bool()
ENDS = torch.tensor([[0, 1, 0, 0, 1, 0, 0]]).bool()
VALUES = torch.tensor([[9.0, 4.0, 9.0, 9.0, -6.0, 9.0, math.nan]])


def spread(**settings):
    return spread_rewards(VALUES, ENDS, MASK, **settings)[0].tolist()


def test_interpolations_by_hand():
    assert spread() == [2, 2, -2, -2, -2, 0, 0]
    assert spread(interpolation="repeat") == [4, 4, -6, -6, -6, 0, 0]
    assert spread(interpolation="end") == [0, 4, 0, 0, -6, 0, 0]


def test_segment_total_mean_divides_by_the_number_of_segments():
    assert spread(segment_total="mean") == [1, 1, -1, -1, -1, 0, 0]


def test_length_normalize_divides_by_the_response_length_terminator_included():
    expected = [2 / 6, 2 / 6, -2 / 6, -2 / 6, -2 / 6, 0, 0]
    assert spread(length_normalize=True) == pytest.approx(expected)


def test_the_clamp_comes_last():
    assert spread(interpolation="repeat", clip=5.0) == [4, 4, -5, -5, -5, 0, 0]
    assert spread(clip=5.0) == spread()  # the segment's -6 is within the limit once it is spread
    normalised = spread(interpolation="repeat", clip=0.5, length_normalize=True)
    assert normalised == pytest.approx([0.5, 0.5, -0.5, -0.5, -0.5, 0, 0])


def test_normalisation_uses_the_location_of_each_segment():
    normalizer = LocationNormalizer(1.0, 0.5, 2.0, 3.0)
    log_half = math.log(0.5)
    first = (4 - (log_half + 2)) / (0.5 * log_half + 3)
    last = (-6 - 2) / 3
    expected = [0, first, 0, 0, last, 0, 0]
    assert spread(normalizer=normalizer, interpolation="end") == pytest.approx(expected)


@pytest.mark.parametrize("normalizer", [None, LocationNormalizer(0.7, 0.2, 0.4, 2.8)])
@pytest.mark.parametrize("granularity", ["segment", "token", "bandit"])
def test_even_and_end_hand_out_the_same_total(granularity, normalizer):
    generator = torch.Generator().manual_seed(1)
    mask = torch.arange(20) < torch.tensor([0, 1, 2, 9, 20])[:, None]
    entropy = torch.rand(5, 20, generator=generator) * 4
    values = torch.randn(5, 20, generator=generator)
    ends = segment_ends(entropy, mask, granularity=granularity, cutoff=2.0)
    even = spread_rewards(values, ends, mask, normalizer=normalizer)
    end = spread_rewards(values, ends, mask, normalizer=normalizer, interpolation="end")
    torch.testing.assert_close(even.sum(1), end.sum(1))
    assert not even[~mask].any()
    assert not end[~ends].any()


def test_mean_total_is_what_the_reward_model_was_trained_on():
    rewards = spread_rewards(VALUES, ENDS, MASK, segment_total="mean")
    torch.testing.assert_close(rewards.sum(1), aggregate_segments(VALUES, ENDS))


def test_one_segment_is_bandit():
    mask = torch.ones(2, 5, dtype=torch.bool)
    ends = torch.zeros_like(mask)
    ends[:, -1] = True
    values = torch.arange(10.0).reshape(2, 5) / 10
    settings = {"normalizer": LocationNormalizer(0, 0, 0.5, 2.0), "interpolation": "end"}
    rewards = spread_rewards(values, ends, mask, **settings)
    score = aggregate_segments(values, ends)
    assert torch.equal(rewards[:, :-1], torch.zeros(2, 4))
    torch.testing.assert_close(rewards[:, -1], (score - 0.5) / 2)


def test_inputs_stay_as_they_are():
    before = VALUES.clone(), ENDS.clone(), MASK.clone()
    spread(normalizer=LocationNormalizer(1, 1, 1, 1), segment_total="mean", length_normalize=True)
    for now, then in zip((VALUES, ENDS, MASK), before, strict=True):
        torch.testing.assert_close(now, then, rtol=0, atol=0, equal_nan=True)


def test_unknown_words():
    with pytest.raises(DenserlError, match="unknown interpolation 'linear'"):
        spread(interpolation="linear")
    with pytest.raises(DenserlError, match="unknown segment_total 'max'"):
        spread(segment_total="max")


def test_kl_penalty_by_hand():
    rewards = torch.tensor([[1.0, 1.0, 7.0]])
    logprobs, reference = torch.tensor([[-1.0, -2.0, 0.0]]), torch.tensor([[-1.5, -1.0, -math.inf]])
    mask = torch.tensor([[True, True, False]])
    expected = torch.tensor([[0.95, 1.1, 7.0]])
    torch.testing.assert_close(penalize_kl(rewards, logprobs, reference, mask, 0.1), expected)
    assert torch.equal(penalize_kl(rewards, logprobs, reference, mask, 0.0), rewards)
    assert torch.equal(penalize_kl(rewards, logprobs, reference, mask, -1.0), rewards)


REWARDS = torch.tensor([[1.0, 2.0, 3.0, 0.0], [1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 0.0, 0.0]])
LENGTHS = torch.arange(4) < torch.tensor([3, 4, 2])[:, None]
TERMINATED = torch.tensor([False, False, True])


def test_without_penalties_rewards_stay():
    assert torch.equal(replace_penalized(REWARDS, LENGTHS, TERMINATED), REWARDS)


def test_missing_terminator_replaces_the_rewards_of_response_tokens():
    ours = replace_penalized(REWARDS, LENGTHS, TERMINATED, missing_eos_penalty=-0.5)
    assert ours.tolist() == [[-0.5, -0.5, -0.5, 0], [-0.5] * 4, [1, 2, 0, 0]]


def test_the_limit_itself_is_not_over_long_and_over_long_outranks_a_missing_terminator():
    ours = replace_penalized(
        REWARDS,
        LENGTHS,
        TERMINATED,
        missing_eos_penalty=-0.5,
        max_response_tokens=3,
        overlong_penalty=-2.0,
    )
    assert ours.tolist() == [[-0.5, -0.5, -0.5, 0], [-2] * 4, [1, 2, 0, 0]]


def test_bandit_pays_the_penalty_on_the_last_token():
    ours = replace_penalized(
        REWARDS, LENGTHS, TERMINATED, missing_eos_penalty=-0.5, last_token_only=True
    )
    assert ours.tolist() == [[0, 0, -0.5, 0], [0, 0, 0, -0.5], [1, 2, 0, 0]]


def test_half_a_length_limit_is_an_error():
    with pytest.raises(DenserlError, match="belong together"):
        replace_penalized(REWARDS, LENGTHS, TERMINATED, max_response_tokens=3)


def test_adaptive_kl_steers_to_its_target():
    kl = AdaptiveKL(0.1, target=0.5, horizon=1000)
    kl.update(0.55, 100)  # 10 % above: 0.1 * (1 + 0.1 * 100 / 1000)
    assert kl.coef == pytest.approx(0.101)
    kl.update(9.0, 100)  # the error counts as 20 % at most
    assert kl.coef == pytest.approx(0.101 * 1.02)
    resumed = AdaptiveKL(kl.coef, target=0.5, horizon=1000)
    for controller in (kl, resumed):
        controller.update(0.0, 100)
    assert resumed.coef == kl.coef == pytest.approx(0.101 * 1.02 * 0.98)


def test_without_a_target_the_coefficient_is_fixed():
    kl = AdaptiveKL(0.1)
    kl.update(100.0, 100)
    assert kl.coef == 0.1


@pytest.mark.parametrize("interpolation", ["even", "repeat", "end"])
def test_spreading_is_what_a_loop_over_the_tokens_does(interpolation):
    """Masks with holes on either side, empty rows, no columns, and anything off the ends."""
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        columns = seed % 11
        mask = torch.rand(6, columns, generator=generator) < (0.9 if seed % 2 else 0.4)
        ends = mask & (torch.rand(6, columns, generator=generator) < 0.4)
        values = torch.randn(6, columns, generator=generator).masked_fill(~ends, math.nan)
        found = spread_rewards(values, ends, mask, interpolation=interpolation)
        expected = torch.zeros(6, columns)
        for row in range(6):
            segment = []
            for column in mask[row].nonzero().flatten().tolist():
                segment.append(column)
                if ends[row, column]:
                    value = values[row, column]
                    if interpolation == "end":
                        segment = [column]
                    elif interpolation == "even":
                        value = value / len(segment)
                    expected[row, segment] = value
                    segment = []
        torch.testing.assert_close(found, expected)
