"""The numbers and the samples of a rollout, by hand."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from denserl_cli.core.normalizer import LocationNormalizer
from denserl_cli.core.ppo.metrics import (
    explained_variance,
    location_metrics,
    reward_metrics,
    rollout_metrics,
    samples,
)
from denserl_cli.core.ppo.rollout import Rollout
from tests import tiny


@pytest.fixture
def two() -> Rollout:
    """A terminated response of three tokens in two segments and an unterminated one of one."""
    mask = torch.tensor([[True, True, True], [True, False, False]])
    nothing = torch.zeros(2, 3)
    return Rollout(
        prompts=[np.array([1]), np.array([2])],
        responses=[np.array([65, 66, 0]), np.array([67])],
        terminated=torch.tensor([True, False]),
        response_mask=mask,
        logprobs=torch.tensor([[-1.0, -2.0, -3.0], [-1.0, 9.0, 9.0]]),
        policy_entropy=torch.tensor([[1.0, 0.5, 0.25], [2.0, 0.0, 0.0]]),
        reference_logprobs=torch.tensor([[-2.0, -2.5, -3.0], [-0.5, 0.0, 0.0]]),
        entropy=nothing,
        values=nothing,
        token_values=torch.tensor([[2.0, 4.0, 100.0], [-1.0, 0.0, 0.0]]),
        ends=torch.tensor([[True, True, False], [True, False, False]]),
    )


def test_rollout_metrics(two: Rollout):
    metrics = {name: value.item() for name, value in rollout_metrics(two, "mean").items()}
    assert metrics == pytest.approx(
        {
            "rm_score": (3 - 1) / 2,
            "rm_score_std": 2.0,
            "kl": (1.5 - 0.5) / 2,
            "kl_per_token": 1.0 / 4,
            "entropy": 3.75 / 4,
            "response_length": 2.0,
            "terminated": 0.5,
            "segments_per_response": 1.5,
            "segment_length": 3 / 3,  # the terminator belongs to no segment
        }
    )


def reward(two: Rollout, rewards: torch.Tensor, normalizer: Any, *settings: str) -> dict[str, Any]:
    clip = tiny.recipe(*settings).ppo.reward_clip
    made = reward_metrics(two, rewards, clip, normalizer)
    return {name: value.tolist() for name, value in made.items()}


def test_reward_metrics(two: Rollout):
    rewards = torch.tensor([[10.0, -10.0, 0.0], [9.9, 0.0, 0.0]])
    floored = LocationNormalizer(0.0, 4.0, 1.0, 3.0, min_std=0.5)  # std(0.5) = 0.23, std(1) = 3
    found = reward(two, rewards, floored)
    assert found["dense_reward"] == pytest.approx(9.9 / 2)
    assert found["clipped_rewards"] == pytest.approx(2 / 3)  # of the tokens with a reward
    assert found["floored_segments"] == pytest.approx(1 / 3)
    assert found["location_segments"] == [0, 0, 0, 0, 1, 0, 0, 0, 0, 2]
    assert found["location_value_mean"][4::5] == [2.0, (4 - 1) / 2]
    assert found["location_value_std"][4::5] == [0.0, 2.5]
    assert found["location_reward_mean"][4::5] == pytest.approx([1 / 0.5, (3 - 2) / 3 / 2])
    assert found["location_reward_std"][4::5] == pytest.approx([0.0, 5 / 3 / 2])
    assert math.isnan(found["location_value_mean"][0])
    assert "floored_segments" not in reward(two, rewards, None)


def test_a_clipped_reward_on_the_terminator_counts(two: Rollout):
    alone = two._replace(token_values=None)
    assert reward(alone, torch.zeros(2, 3), None)["clipped_rewards"] == 0
    own = torch.tensor([[0.0, 0.0, -10.0], [4.0, 0.0, 0.0]])  # a number for each response
    assert reward(alone, own, None)["clipped_rewards"] == 1 / 2


@pytest.mark.parametrize("count", [1, 3, 10, 30, 100])
def test_a_location_on_the_edge_of_a_bin_belongs_to_the_lower_bin(count: int):
    ends = torch.ones(1, count, dtype=torch.bool)
    found = location_metrics(torch.zeros(1, count), ends, None)["location_segments"]
    exact = [math.ceil(Fraction(10 * (k + 1), count)) - 1 for k in range(count)]
    assert found.tolist() == [exact.count(place) for place in range(10)]


def test_explained_variance():
    returns = torch.tensor([[1.0, 3.0, 99.0]])
    mask = torch.tensor([[True, True, False]])
    half = torch.tensor([[0.0, 1.0, 0.0]])  # errors 1 and 2: variance 1/4 of a variance of 1
    assert explained_variance(half, returns, mask).item() == pytest.approx(0.75)
    assert explained_variance(returns, returns, mask).item() == 1.0
    assert explained_variance(torch.zeros(1, 3), returns, mask).item() == 0.0
    constant = torch.ones(1, 3)
    assert explained_variance(constant, constant, mask).item() == 1.0


class Letters:
    def decode(self, ids, **_: object) -> str:
        return "".join(chr(i) for i in ids)


def test_samples_show_segments_with_their_value_and_reward(two: Rollout):
    rewards = torch.tensor([[0.5, 0.25, -7.0], [-1.5, 0.0, 0.0]])
    assert samples(two, rewards, Letters(), ["one", "two"], 5) == [
        {
            "prompt": "one",
            "segments": [
                {"text": "A", "tokens": 1, "value": 2.0, "reward": 0.5},
                {"text": "B", "tokens": 1, "value": 4.0, "reward": -6.75},  # the terminator's too
            ],
        },
        {"prompt": "two", "segments": [{"text": "C", "tokens": 1, "value": -1.0, "reward": -1.5}]},
    ]
    first = samples(two, rewards, Letters(), ["one", "two"], 1)
    assert [shown["prompt"] for shown in first] == ["one"]
    apart = samples(two, rewards, Letters(), ["one", "two"], 5, every=2)
    assert [shown["prompt"] for shown in apart] == ["one"]


def test_the_rewards_of_a_samples_segments_add_up_to_the_responses(two: Rollout):
    rewards = torch.tensor([[0.0, 0.0, 3.0], [2.0, 0.0, 0.0]])  # a number for each response
    shown = samples(two, rewards, Letters(), ["one", "two"], 2)
    assert [sum(part["reward"] for part in one["segments"]) for one in shown] == [3.0, 2.0]


def test_the_reward_of_a_segment_is_the_sum_over_its_tokens(two: Rollout):
    whole = two._replace(ends=torch.tensor([[False, False, True], [True, False, False]]))
    rewards = torch.tensor([[0.5, 0.25, -7.0], [-1.5, 0.0, 0.0]])
    (shown, _) = samples(whole, rewards, Letters(), ["one", "two"], 2)
    assert shown["segments"] == [{"text": "AB\x00", "tokens": 3, "value": 100.0, "reward": -6.25}]
