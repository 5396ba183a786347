"""The formulas of the sources, against what they promise and against cases done by hand."""

from itertools import permutations as orders_of
from math import factorial

import numpy as np
import pytest
import torch

from denserl_cli.core.ppo.advantages import generalized_advantages
from denserl_cli.core.ppo.rewards import spread_segments
from denserl_cli.core.ppo.sources.attention import attention
from denserl_cli.core.ppo.sources.differences import differences
from denserl_cli.core.ppo.sources.log_ratio import log_ratio
from denserl_cli.core.ppo.sources.record import Inputs, asked_by, promised
from denserl_cli.core.ppo.sources.shapley import (
    all_coalitions,
    exact_shapley,
    joined,
    permutations,
    sampled_shapley,
)
from denserl_cli.core.ppo.sources.values import score

MASK = torch.tensor([[True] * 6, [True] * 3 + [False] * 3])
ENDS = torch.tensor(
    [[False, True, False, True, True, False], [False, True, False, False, False, False]]
)


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_differences_done_by_hand():
    values = torch.tensor([[1.0, 4.0, 9.0, 7.0, 8.0, 99.0], [5.0, 2.0, 9.0, 0.0, 0.0, 0.0]])
    found = differences(values, torch.tensor([3.0, 0.5]), ENDS)
    assert found.tolist() == [[0, 1, 0, 3, 1, 0], [0, 1.5, 0, 0, 0, 0]]
    tokens = differences(values, torch.tensor([3.0, 0.5]), MASK)
    assert tokens.tolist() == [[-2, 3, 5, -2, 1, 91], [4.5, -3, 7, 0, 0, 0]]


@pytest.mark.parametrize("places", [ENDS, MASK])
def test_differences_telescope(places):
    values, prompt = drawn(0, 2, 6), drawn(1, 2)
    last = torch.stack([row[at][-1] for row, at in zip(values, places, strict=True)])
    torch.testing.assert_close(
        differences(values, prompt, places).sum(1), last - prompt, rtol=0, atol=1e-14
    )


def test_differences_of_one_segment_are_its_score_but_for_the_prompts_value():
    values, prompt = drawn(2, 2, 6), drawn(3, 2)
    whole = MASK & (MASK.cumsum(1) == MASK.sum(1, keepdim=True))
    expected = score(values[whole] - prompt, MASK)
    assert torch.equal(differences(values, prompt, whole), expected)


@pytest.mark.parametrize("lam", [0.0, 0.5, 0.95, 1.0])
def test_differences_shape_by_the_potential_of_the_values(lam):
    """GAE of the end reward with a critic V is GAE of differences with a critic V - R."""
    mask = torch.ones(2, 6, dtype=torch.bool)
    values, prompt, critic = drawn(4, 2, 6), drawn(5, 2), drawn(6, 2, 6)
    ended = torch.zeros(2, 6, dtype=torch.float64)
    ended[:, -1] = values[:, -1]
    states = torch.cat([prompt[:, None], values[:, :-1]], dim=1)  # R in the state before each token
    dense = differences(values, prompt, mask)
    plain, _ = generalized_advantages(ended, critic, mask, gamma=1.0, lam=lam)
    shaped, _ = generalized_advantages(dense, critic - states, mask, gamma=1.0, lam=lam)
    torch.testing.assert_close(plain, shaped, rtol=0, atol=1e-14)


def test_attention_and_score_add_up_to_the_score():
    weights = drawn(7, 2, 6).abs() * MASK
    weights = weights / weights.sum(1, keepdim=True)
    worth = torch.tensor([3.0, -2.0], dtype=torch.float64)
    torch.testing.assert_close(attention(weights, worth).sum(1), worth)
    assert score(worth, MASK).tolist() == [[0, 0, 0, 0, 0, 3], [0, 0, -2, 0, 0, 0]]


def test_the_log_ratio_is_clamped_after_its_scale_and_zero_of_the_reference():
    reference = drawn(8, 2, 6).float() * MASK
    assert not log_ratio(reference, reference, MASK).any()
    model = reference + torch.tensor([0.5, -0.5, 4.0, -4.0, 0.0, 1.0])
    found = log_ratio(model, reference, MASK, scale=0.05, clip=0.05)[0]
    torch.testing.assert_close(
        found, torch.tensor([0.025, -0.025, 0.05, -0.05, 0, 0.05]), rtol=0, atol=1e-6
    )
    assert not log_ratio(model, reference, MASK)[1, 3:].any()


def test_the_softmin_is_the_least_segment_in_the_cold_and_the_mean_in_the_heat():
    rewards = torch.tensor([[0, 3.0, 0, -1.0, 2.0, 0], [0, 5.0, 0, 0, 0, 0]])

    def total(tau):
        how = {"segment_total": "softmin", "softmin_temperature": tau}
        return spread_segments(rewards, ENDS, MASK, interpolation="end", **how).sum(1)

    torch.testing.assert_close(total(1e-3), torch.tensor([-1.0, 5.0]))
    torch.testing.assert_close(total(1e6), torch.tensor([4 / 3, 5.0]), rtol=1e-4, atol=0)
    weights = torch.tensor([-3.0, 1.0, -2.0]).softmax(0)
    expected = (weights * torch.tensor([3.0, -1.0, 2.0])).sum()
    torch.testing.assert_close(total(1.0)[0], expected)
    even = spread_segments(rewards, ENDS, MASK, segment_total="softmin", softmin_temperature=1.0)
    torch.testing.assert_close(even.sum(1), total(1.0))
    nothing = torch.zeros_like(ENDS)
    assert not spread_segments(rewards, nothing, MASK, segment_total="softmin").any()


def worth_of(function, players):
    return torch.tensor(
        [function({i for i in range(players) if row[i]}) for row in all_coalitions(players)],
        dtype=torch.float64,
    )


def glove(coalition):
    """Players 0 and 1 hold left gloves, 2 a right one; a pair is worth 1."""
    return float(2 in coalition and len(coalition) > 1)


def test_exact_shapley_values_have_their_closed_forms():
    torch.testing.assert_close(
        exact_shapley(worth_of(glove, 3)), torch.tensor([1 / 6, 1 / 6, 4 / 6]).double()
    )
    additive = worth_of(lambda a: 2.0 + sum(i * i for i in a), 5)
    torch.testing.assert_close(
        exact_shapley(additive), torch.tensor([0.0, 1, 4, 9, 16], dtype=torch.float64)
    )
    assert exact_shapley(torch.tensor([1.0, 4.0])).tolist() == [3]


def test_exact_shapley_is_the_mean_gain_over_all_orders():
    worth = drawn(9, 2**4)
    expected = torch.zeros(4, dtype=torch.float64)
    for order in orders_of(range(4)):
        inside = 0
        for player in order:
            expected[player] += worth[inside + 2**player] - worth[inside]
            inside += 2**player
    torch.testing.assert_close(exact_shapley(worth), expected / factorial(4))


def test_shapley_values_are_efficient_symmetric_and_nothing_for_nothing():
    worth = drawn(10, 2**5)
    torch.testing.assert_close(exact_shapley(worth).sum(), worth[-1] - worth[0])
    found = exact_shapley(worth_of(lambda a: len(a & {0, 3}) ** 2 + 5.0 * (1 in a), 5))
    torch.testing.assert_close(found[0], found[3])
    assert found[2].abs() < 1e-14 and found[4].abs() < 1e-14
    torch.testing.assert_close(found[1], torch.tensor(5.0).double())


def sampled(function, players, count, seed=b"a response"):
    orders = permutations(players, count, seed)
    worth = [function({i for i in range(players) if row[i]}) for row in joined(orders)]
    ends = [torch.tensor(function(set(who)), dtype=torch.float64) for who in ((), range(players))]
    return sampled_shapley(torch.tensor(worth, dtype=torch.float64), *ends, orders)


def test_sampled_shapley_values_add_up_and_come_near():
    def product(coalition):
        return float(np.prod([1 + 0.1 * i for i in coalition]))

    one = sampled(product, 7, 1)
    torch.testing.assert_close(one.sum(), torch.tensor(product(set(range(7))) - 1).double())
    many, exact = sampled(product, 7, 4000), exact_shapley(worth_of(product, 7))
    torch.testing.assert_close(many, exact, rtol=0.05, atol=0.01)
    assert torch.equal(sampled(product, 7, 3), sampled(product, 7, 3))
    assert not torch.equal(sampled(product, 7, 3), sampled(product, 7, 3, b"another"))


def test_a_source_is_asked_for_by_the_names_of_its_parameters():
    def mine(score, tokens, colour=1): ...

    assert asked_by(mine) == ("tokens", "score")
    assert asked_by(mine, "final value - prompt value") == (
        *("tokens", "prompt_value", "final_value", "score"),
    )
    inputs = Inputs(final_value=torch.tensor([3.0]), prompt_value=torch.tensor([1.0]))
    assert promised("final value - prompt value", inputs).tolist() == [2]
