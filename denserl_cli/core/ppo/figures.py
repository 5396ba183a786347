"""What a rollout says in numbers and in samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from denserl_cli.core.ppo.rewards import replace_penalized, spread_rewards
from denserl_cli.core.reward_model import aggregate_segments
from denserl_cli.core.segmentation import segment_ids
from denserl_cli.core.text import segment_texts

if TYPE_CHECKING:
    from denserl_cli.core.normalizer import LocationNormalizer
    from denserl_cli.core.ppo.own_rewards import Earned
    from denserl_cli.core.ppo.rollout import Rollout
    from denserl_cli.core.recipe.schema import Aggregate, Recipe


def rollout_figures(rollout: Rollout, aggregate: Aggregate) -> dict[str, Tensor]:
    """Means over the responses of a rollout, each 0-d.

    aggregate: how the reward model scores a response. kl: nats a response, the k1 estimate summed
    over its tokens. segment_length: tokens; a terminator that belongs to no segment does not count.
    """
    figures = response_figures(rollout, aggregate)
    kl, lengths = figures["kl"], figures["response_length"]
    inside = segment_ids(rollout.ends, rollout.response_mask) >= 0
    means = {name: values.mean() for name, values in figures.items()}
    if "rm_score" in figures:
        means["rm_score_std"] = figures["rm_score"].std(correction=0)
    return {
        **means,
        "kl_per_token": kl.sum() / lengths.sum(),
        "segment_length": inside.sum() / figures["segments_per_response"].sum(),
    }


def response_figures(rollout: Rollout, aggregate: Aggregate) -> dict[str, Tensor]:
    """What `rollout_figures` takes the mean of: the figures of each response, (R,) each."""
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


def dense_rewards(
    rollout: Rollout,
    recipe: Recipe,
    normalizer: LocationNormalizer | None,
    own: Earned | None = None,
) -> Tensor:
    """Each token's reward before the KL penalty: (R, T) (method §5).

    own: of the user's reward functions, which the normaliser does not touch.
    """
    settings, mask = recipe.ppo, rollout.response_mask
    rewards = torch.zeros_like(rollout.logprobs) if own is None else own.tokens
    if rollout.token_values is not None:
        learned = spread_rewards(
            rollout.token_values,
            rollout.ends,
            mask,
            normalizer=normalizer,
            interpolation=settings.interpolation or "even",
            segment_total=settings.segment_total,
            clip=math.inf,
        )
        rewards = rewards + settings.learned_weight * learned
    if settings.length_normalize:
        rewards = rewards / mask.sum(1, keepdim=True).clamp(min=1)
    return replace_penalized(
        rewards.clamp(-settings.reward_clip, settings.reward_clip),
        mask,
        rollout.terminated,
        missing_eos_penalty=settings.missing_eos_penalty,
        max_response_tokens=settings.max_response_tokens,
        overlong_penalty=settings.overlong_penalty,
        last_token_only=recipe.segmentation.granularity == "bandit",
    )


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """Share of the returns' variance that the critic foresaw: 1 - Var(returns - values)/Var."""
    error, target = (returns - values)[mask], returns[mask]
    return 1 - error.var(correction=0) / target.var(correction=0).clamp(min=1e-8)


def samples(
    rollout: Rollout, earned: Tensor, tokenizer: Any, prompts: Sequence[str], count: int
) -> list[dict[str, Any]]:
    """The first `count` responses with their segments' text, raw value and token rewards.

    earned: (R, T) the dense reward of each token before the KL penalty.
    """
    shown = []
    for row in range(min(count, len(rollout.responses))):
        ends = torch.nonzero(rollout.ends[row])[:, 0].tolist()
        starts = [0, *(end + 1 for end in ends)]
        texts = segment_texts(tokenizer, rollout.responses[row], ends)
        values = None if rollout.token_values is None else rollout.token_values[row].tolist()
        rewards = earned[row].cumsum(0).tolist()
        segments = [
            {
                "text": text,
                "tokens": end + 1 - start,
                "value": None if values is None else values[end],
                "reward": rewards[end] - (rewards[start - 1] if start else 0.0),
            }
            for text, start, end in zip(texts, starts, ends, strict=False)
        ]
        shown.append({"prompt": prompts[row], "segments": segments})
    return shown
