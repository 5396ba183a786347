"""Metrics and samples of a rollout."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from denserl_cli.core.chat.decoding import segment_values
from denserl_cli.core.normalizer import locations, normalize
from denserl_cli.core.segmentation import aggregate_segments, segment_ids

if TYPE_CHECKING:
    from denserl_cli.core.normalizer import LocationNormalizer
    from denserl_cli.core.ppo.rollout import Rollout
    from denserl_cli.core.recipe.schema import Aggregate


LOCATIONS = 10
"""Bins of a segment's location p: (0, 0.1], (0.1, 0.2] … (0.9, 1]."""


def rollout_metrics(rollout: Rollout, aggregate: Aggregate) -> dict[str, Tensor]:
    """Means over the responses of a rollout.

    Args:
        rollout: With R responses.
        aggregate: How the reward model scores a response.

    Returns:
        Metrics by name, 0-d each. kl: nats a response, the k1 estimate summed over its tokens.
        entropy: nats a token, of the policy where it drew the token; absent where it is not known.
        segment_length: tokens; a terminator that belongs to no segment does not count.
    """
    metrics = response_metrics(rollout, aggregate)
    kl, lengths = metrics["kl"], metrics["response_length"]
    inside = segment_ids(rollout.ends, rollout.response_mask) >= 0
    means = {name: values.mean() for name, values in metrics.items()}
    if "rm_score" in metrics:
        means["rm_score_std"] = metrics["rm_score"].std(correction=0)
    if rollout.policy_entropy is not None:
        means["entropy"] = rollout.policy_entropy.sum() / lengths.sum()
    return {
        **means,
        "kl_per_token": kl.sum() / lengths.sum(),
        "segment_length": inside.sum() / metrics["segments_per_response"].sum(),
    }


def response_metrics(rollout: Rollout, aggregate: Aggregate) -> dict[str, Tensor]:
    """What `rollout_metrics` takes the mean of: the metrics of each response, (R,) each."""
    mask, values = rollout.response_mask, rollout.token_values
    score = {}
    if values is not None:
        score = {"rm_score": aggregate_segments(values, rollout.ends, aggregate)}
    return {
        **score,
        "kl": ((rollout.logprobs - rollout.reference_logprobs) * mask).sum(1),
        "response_length": mask.sum(1).float(),
        "terminated": rollout.terminated.float(),
        "segments_per_response": rollout.ends.sum(1).float(),
    }


def reward_metrics(
    rollout: Rollout, rewards: Tensor, clip: float, normalizer: LocationNormalizer | None
) -> dict[str, Tensor]:
    """Metrics of the token rewards and of the segment values that they are computed from.

    Args:
        rollout: With R responses.
        rewards: (R, T), of `dense_rewards`.
        clip: `ppo.reward_clip`.
        normalizer: Of the reward model's values.

    Returns:
        Metrics by name, 0-d or (LOCATIONS,). dense_reward: sum over a response's tokens, mean over
        the responses. clipped_rewards: share of the tokens with a reward (not 0) whose reward is at
        ± clip. floored_segments: share of segments where the normaliser's std is at its floor.
        location_*: see `location_metrics`.
    """
    clipped, paid = rewards.abs() >= clip, rewards != 0
    metrics = {
        "dense_reward": rewards.sum(1).mean(),
        "clipped_rewards": clipped.sum() / paid.sum().clamp(min=1),
    }
    if rollout.token_values is not None:
        metrics |= location_metrics(rollout.token_values, rollout.ends, normalizer)
    if normalizer is not None and normalizer.min_std is not None:
        std = normalizer.std(locations(rollout.ends, torch.float64))
        floored = (std <= normalizer.min_std) & rollout.ends
        metrics["floored_segments"] = floored.sum() / rollout.ends.sum()
    return metrics


def location_metrics(
    token_values: Tensor, ends: Tensor, normalizer: LocationNormalizer | None
) -> dict[str, Tensor]:
    """Segment rewards by location, before (value) and after (reward) normalisation.

    Args:
        token_values: (R, T), of the reward model.
        ends: (R, T) bool, of the segments.
        normalizer: Of the values; None leaves them as they are.

    Returns:
        (LOCATIONS,) each: the number of segments in each bin, and mean and population std of their
        values and rewards; NaN in an empty bin.
    """
    order, count = ends.cumsum(1), ends.sum(1, keepdim=True).clamp(min=1)
    bins = ((LOCATIONS * order - 1) // count)[ends]  # ceil(LOCATIONS p) - 1, exactly
    segments = torch.bincount(bins, minlength=LOCATIONS)
    metrics: dict[str, Tensor] = {"location_segments": segments}
    rewards = normalize(token_values.double(), ends, normalizer)
    for name, values in (("value", token_values.double()[ends]), ("reward", rewards[ends])):
        mean = torch.bincount(bins, values, LOCATIONS) / segments
        square = torch.bincount(bins, (values - mean[bins]).square(), LOCATIONS) / segments
        metrics |= {f"location_{name}_mean": mean, f"location_{name}_std": square.sqrt()}
    return metrics


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """Explained variance of the critic, 1 - Var(returns - values) / Var(returns); (R, T) each."""
    error, target = (returns - values)[mask], returns[mask]
    return 1 - error.var(correction=0) / target.var(correction=0).clamp(min=1e-8)


def samples(
    rollout: Rollout,
    rewards: Tensor,
    tokenizer: Any,
    prompts: Sequence[str],
    count: int,
    every: int = 1,
) -> list[dict[str, Any]]:
    """The first `count` responses with their segments' text, raw value and reward.

    Args:
        rollout: With R responses.
        rewards: (R, T), the dense reward of each token before the KL penalty; what a terminator
            outside the segments is given counts for the last one.
        tokenizer: Decodes the responses.
        prompts: Text of each prompt.
        count: Samples to make, at most.
        every: Take one response of so many; 1 takes the first ones.
    """
    shown = []
    for row in range(0, len(rollout.responses), every)[:count]:
        ends = torch.nonzero(rollout.ends[row])[:, 0].tolist()
        values = None if rollout.token_values is None else rollout.token_values[row].tolist()
        sums = [0.0, *rewards[row].cumsum(0)[ends[:-1]].tolist(), rewards[row].sum().item()]
        segments = segment_values(tokenizer, rollout.responses[row], ends, values)
        for segment, (before, after) in zip(segments, pairwise(sums), strict=True):
            segment["reward"] = after - before
        shown.append({"prompt": prompts[row], "segments": segments})
    return shown
