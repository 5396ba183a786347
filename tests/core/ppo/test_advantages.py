from __future__ import annotations

import math

import pytest
import torch

from denserl_cli.core.ppo.advantages import generalized_advantages, whiten

ALL = torch.ones(1, 3, dtype=torch.bool)


def test_three_tokens_by_hand():
    rewards, values = torch.tensor([[1.0, 0.0, 2.0]]), torch.tensor([[0.5, 1.0, -1.0]])
    advantages, returns = generalized_advantages(rewards, values, ALL, gamma=0.9, lam=0.5)
    # delta = (1 + .9 - .5, -.9 - 1, 2 + 1); A2 = 3, A1 = -1.9 + .45 * 3, A0 = 1.4 + .45 * A1
    torch.testing.assert_close(advantages, torch.tensor([[1.1525, -0.55, 3.0]]))
    torch.testing.assert_close(returns, advantages + values)


def test_lambda_1_gives_the_discounted_sum_of_rewards():
    rewards, values = torch.randn(4, 6), torch.randn(4, 6)
    mask = torch.ones(4, 6, dtype=torch.bool)
    _, returns = generalized_advantages(rewards, values, mask, gamma=0.9, lam=1.0)
    discounts = 0.9 ** torch.arange(6.0)
    torch.testing.assert_close(returns[:, 0], rewards @ discounts, rtol=1e-4, atol=1e-5)


def test_padding_changes_nothing_whatever_it_holds():
    rewards, values = torch.tensor([[1.0, 0.0, 2.0]]), torch.tensor([[0.5, 1.0, -1.0]])
    alone = generalized_advantages(rewards, values, ALL, gamma=0.9, lam=0.5)
    junk = torch.full((1, 2), math.nan)
    mask = torch.tensor([[True, True, True, False, False]])
    padded = generalized_advantages(
        torch.cat((rewards, junk), 1), torch.cat((values, junk), 1), mask, gamma=0.9, lam=0.5
    )
    for ours, theirs in zip(padded, alone, strict=True):
        assert torch.equal(ours[:, :3], theirs)
        assert torch.equal(ours[:, 3:], torch.zeros(1, 2))


def test_whiten_by_hand():
    values = torch.tensor([[1.0, 3.0, math.nan], [5.0, 7.0, 1e9]])
    mask = torch.tensor([[True, True, False], [True, True, False]])
    ours = whiten(values, mask)  # mean 4, population variance 5
    expected = torch.tensor([[-3.0, -1.0, 0.0], [1.0, 3.0, 0.0]]) / math.sqrt(5)
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("tokens", [0, 1, 3])
def test_whiten_of_values_without_spread_is_0(tokens):
    mask = (torch.arange(3) < tokens)[None]
    assert torch.equal(whiten(torch.full((1, 3), 2.5), mask), torch.zeros(1, 3))


def test_half_precision_is_summed_in_float32():
    values = torch.randn(100, 1000).half()
    mask = torch.ones_like(values, dtype=torch.bool)
    ours = whiten(values, mask)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, whiten(values.float(), mask))
    large = whiten(torch.tensor([[3e4, 6e4]]).half(), mask[:1, :2])
    torch.testing.assert_close(large, torch.tensor([[-1.0, 1.0]]))
    half = values.bfloat16()
    for ours, plain in zip(
        generalized_advantages(half, half, mask, gamma=1.0, lam=0.95),
        generalized_advantages(half.float(), half.float(), mask, gamma=1.0, lam=0.95),
        strict=True,
    ):
        assert torch.equal(ours, plain)


def test_a_batch_without_columns_has_no_advantages():
    nothing, mask = torch.zeros(2, 0), torch.zeros(2, 0, dtype=torch.bool)
    advantages, returns = generalized_advantages(nothing, nothing, mask, gamma=1.0, lam=0.9)
    assert advantages.shape == returns.shape == (2, 0)
