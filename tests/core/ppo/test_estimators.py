"""Advantages of tokens and macro actions, with and without a critic."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from denserl_cli.core.ppo.actions import macro_actions
from denserl_cli.core.ppo.advantages import (
    adaptive_lam,
    generalized_advantages,
    group_advantages,
    returns_to_go,
    whiten,
)
from denserl_cli.core.ppo.estimators import ESTIMATORS, estimate_advantages
from denserl_cli.core.ppo.rollout import Rollout
from denserl_cli.core.recipe.schema import PPOConfig, RolloutConfig

LAMBDAS = (0.0, 0.5, 0.95, 1.0)
MASK = torch.arange(7) < torch.tensor([7, 4, 1, 6])[:, None]
PAIRS = torch.tensor([0, 0, 1, 1])


def numbers(seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(MASK.shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def last_of(mask: Tensor) -> Tensor:
    return mask & (mask.cumsum(1) == mask.sum(1, keepdim=True))


def some_ends(seed: int = 5) -> Tensor:
    """Segments of rows whose last token, a terminator, is in none; but for the one-token row."""
    drawn = numbers(seed) > 0.3
    terminator = last_of(MASK) & (MASK.sum(1, keepdim=True) > 1)
    before = last_of(MASK & ~terminator)
    return (drawn & MASK & ~terminator) | before


def written_out(
    rewards: Tensor, values: Tensor, ends: Tensor, gamma: float, lam: float
) -> list[list[float]]:
    """GAE over macro actions as a double sum over later actions, one token at a time."""
    found = []
    for row in range(len(rewards)):
        length = int(MASK[row].sum())
        actions: list[list[int]] = [[]]
        for token in range(length):
            actions[-1].append(token)
            if ends[row, token]:
                actions.append([])
        actions = [one for one in actions if one]
        paid = [sum(float(rewards[row, t]) for t in one) for one in actions]
        worth = [sum(float(values[row, t]) for t in one) / len(one) for one in actions] + [0.0]
        advantages = [0.0] * rewards.shape[1]
        for k, one in enumerate(actions):
            later = sum(
                (gamma * lam) ** (j - k) * (paid[j] + gamma * worth[j + 1] - worth[j])
                for j in range(k, len(actions))
            )
            for token in one:
                advantages[token] = later
        found.append(advantages)
    return found


@pytest.mark.parametrize("lam", LAMBDAS)
def test_macro_actions_are_the_double_sum_over_segments(lam: float):
    rewards, values, ends = numbers(1), numbers(2), some_ends()
    macro = macro_actions(ends, MASK)
    advantages, returns = generalized_advantages(
        macro.total(rewards), macro.mean(values), macro.mask, gamma=0.9, lam=lam
    )
    expected = torch.tensor(written_out(rewards, values, ends, 0.9, lam), dtype=torch.float64)
    torch.testing.assert_close(macro.spread(advantages), expected)
    mean = macro.spread(macro.mean(values))
    torch.testing.assert_close(macro.spread(returns), (expected + mean) * MASK)


def test_one_token_a_segment_gives_the_bytes_of_tokens(rollout: Rollout):
    mask = rollout.response_mask
    for terminator in (False, True):  # in a segment, or in none
        ends = mask & ~last_of(mask) if terminator else mask
        every = rollout._replace(ends=ends)
        for advantage in ESTIMATORS:
            settings = PPOConfig(
                advantage=advantage,
                rollout=RolloutConfig(samples_per_prompt=2),
                lam="adaptive",
                lam_value=1.0,
            )
            rewards = rollout.token_values
            plain = estimate_advantages(settings, rewards, every)
            macro = estimate_advantages(replace(settings, action="segment"), rewards, every)
            assert torch.equal(plain.advantages * mask, macro.advantages * mask)
            assert (plain.returns is None) == (macro.returns is None)
            if plain.returns is not None:
                assert torch.equal(plain.returns * mask, macro.returns)


@pytest.mark.parametrize("advantage", list(ESTIMATORS))
def test_one_segment_a_response_gives_every_token_one_advantage(advantage: str, rollout: Rollout):
    whole = rollout._replace(ends=last_of(rollout.response_mask))
    settings = PPOConfig(
        advantage=advantage, action="segment", rollout=RolloutConfig(samples_per_prompt=2)
    )
    found = estimate_advantages(settings, rollout.token_values, whole).advantages
    for row, mask in zip(found, rollout.response_mask, strict=True):
        assert len(row[mask].unique()) == 1
    assert len(found[rollout.response_mask].unique()) > 1


def test_the_defaults_are_whitened_gae_of_tokens(rollout: Rollout):
    rewards, mask = rollout.token_values, rollout.response_mask
    found = estimate_advantages(PPOConfig(), rewards, rollout)
    advantages, returns = generalized_advantages(rewards, rollout.values, mask, gamma=1.0, lam=0.95)
    assert torch.equal(found.advantages, whiten(advantages, mask))
    assert torch.equal(found.returns, returns)


def test_the_critics_targets_have_a_lambda_of_their_own(rollout: Rollout):
    rewards, mask = rollout.token_values, rollout.response_mask
    found = estimate_advantages(PPOConfig(lam=0.5, lam_value=1.0), rewards, rollout)
    plain = estimate_advantages(PPOConfig(lam=0.5), rewards, rollout)
    assert torch.equal(found.advantages, plain.advantages)
    whole = returns_to_go(rewards, mask, gamma=1.0)
    torch.testing.assert_close(found.returns * mask, whole, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found.returns, plain.returns)


def test_lambda_by_length():
    mask = torch.arange(100) < torch.tensor([100, 40, 10, 0])[:, None]
    # 1 - 1 / (0.05 · 100) = 0.8, 1 - 1 / 2 = 0.5; below 20 tokens it would be negative
    assert adaptive_lam(mask, 0.05).tolist() == pytest.approx([0.8, 0.5, 0.0, 0.0])
    rewards, values = numbers(1), numbers(2)
    decay = adaptive_lam(MASK, 0.5)
    found, _ = generalized_advantages(rewards, values, MASK, gamma=0.9, lam=decay)
    for row, lam in enumerate(decay.tolist()):
        alone, _ = generalized_advantages(
            rewards[row : row + 1], values[row : row + 1], MASK[row : row + 1], gamma=0.9, lam=lam
        )
        torch.testing.assert_close(found[row : row + 1], alone)


@pytest.mark.parametrize("lam", LAMBDAS)
def test_differences_of_a_potential_only_shape(lam: float):
    """With γ = 1, rewards Φ(t) - Φ(t-1) and values V - Φ give the advantages of Φ(T) at the end."""
    potential, values = numbers(3), numbers(4)
    before = torch.cat([torch.zeros(4, 1, dtype=torch.float64), potential[:, :-1]], 1)
    sparse = potential * last_of(MASK)
    one, _ = generalized_advantages(sparse, values, MASK, gamma=1.0, lam=lam)
    shaped, _ = generalized_advantages(
        potential - before, values - before, MASK, gamma=1.0, lam=lam
    )
    torch.testing.assert_close(shaped[MASK], one[MASK], rtol=1e-12, atol=1e-12)


def test_groups_by_hand():
    mask = torch.tensor([[True, True], [True, False], [True, True], [True, True]])
    rewards = torch.tensor([[1.0, 2.0], [1.0, math.nan], [0.0, 4.0], [2.0, 2.0]])
    # whole returns 3 and 1, 4 and 4
    leave_out = group_advantages(rewards, mask, PAIRS, gamma=1.0, leave_one_out=True)
    assert leave_out.tolist() == [[2.0, 1.0], [-2.0, 0.0], [0.0, 0.0], [0.0, -2.0]]
    plain = group_advantages(rewards, mask, PAIRS, gamma=1.0)
    assert plain.tolist() == [[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0], [0.0, -2.0]]
    divided = group_advantages(rewards, mask, PAIRS, gamma=1.0, divide=True)
    assert divided.tolist() == [[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0], [0.0, 0.0]]  # std 1; 0
    # the other's mean reward of a token: 1 and 1.5, 2 and 2
    by_token = group_advantages(
        rewards, mask, PAIRS, gamma=1.0, leave_one_out=True, baseline="token"
    )
    assert by_token.tolist() == [[1.0, 1.0], [-0.5, 0.0], [0.0, 2.0], [0.0, 0.0]]


@pytest.mark.parametrize("baseline", ["response", "token"])
@pytest.mark.parametrize("leave_one_out", [False, True])
@pytest.mark.parametrize("divide", [False, True])
def test_equal_returns_and_groups_of_one_are_0(baseline: str, leave_one_out: bool, divide: bool):
    settings = {"leave_one_out": leave_one_out, "baseline": baseline, "divide": divide}
    ends = torch.zeros(4, 3)
    ends[:, 2] = 0.1  # 0.1 is no sum of powers of two: rounding must not count as a difference
    mask = torch.ones(4, 3, dtype=torch.bool)
    found = group_advantages(ends, mask, torch.tensor([0, 0, 0, 1]), gamma=1.0, **settings)
    assert torch.isfinite(found).all() and not found[3].any()
    equal = found[:3] if baseline == "response" or divide else found[:3, 0]
    assert equal.abs().max() < 1e-7


@pytest.mark.parametrize("baseline", ["response", "token"])
def test_a_group_written_out(baseline: str):
    rewards, gamma, groups = numbers(6), 0.9, torch.tensor([0, 1, 0, 0])
    found = group_advantages(
        rewards, MASK, groups, gamma=gamma, leave_one_out=True, baseline=baseline
    )
    lengths = MASK.sum(1).tolist()
    for row, length in enumerate(lengths):
        others = [o for o in range(4) if o != row and groups[o] == groups[row]]
        for t in range(MASK.shape[1]):
            expected = 0.0
            if others and t < length:
                if baseline == "token":
                    paid = sum(float(rewards[o, s]) for o in others for s in range(lengths[o]))
                    typical = paid / sum(lengths[o] for o in others)
                    expected = sum(
                        gamma ** (s - t) * (float(rewards[row, s]) - typical)
                        for s in range(t, length)
                    )
                else:
                    wholes = [
                        sum(gamma**s * float(rewards[o, s]) for s in range(lengths[o]))
                        for o in others
                    ]
                    left = sum(gamma ** (s - t) * float(rewards[row, s]) for s in range(t, length))
                    expected = left - sum(wholes) / len(wholes)
            assert found[row, t].item() == pytest.approx(expected, abs=1e-12)


def test_returns_to_go_whitened_are_reinforce_plus_plus(rollout: Rollout):
    rewards, mask = rollout.token_values, rollout.response_mask
    found = estimate_advantages(PPOConfig(advantage="reinforce++", gamma=0.9), rewards, rollout)
    expected = whiten(returns_to_go(rewards, mask, gamma=0.9), mask)
    assert torch.equal(found.advantages, expected) and found.returns is None


def test_group_advantages_compare_samples_of_one_prompt(rollout: Rollout):
    settings = PPOConfig(advantage="rloo", rollout=RolloutConfig(samples_per_prompt=3))
    rewards = rollout.token_values
    found = estimate_advantages(settings, rewards, rollout).advantages
    first = rollout._replace(
        **{
            name: getattr(rollout, name)[:3]
            for name in ("response_mask", "values", "ends", "token_values")
        }
    )
    alone = estimate_advantages(settings, rewards[:3], first).advantages
    torch.testing.assert_close(found[:3], alone)
