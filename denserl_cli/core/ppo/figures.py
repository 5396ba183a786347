"""What a rollout says in numbers and in samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from denserl_cli.core.reward_model import aggregate_segments
from denserl_cli.core.segmentation import segment_ids
from denserl_cli.core.text import segment_texts

if TYPE_CHECKING:
    from denserl_cli.core.ppo.rollout import Rollout
    from denserl_cli.core.recipe.schema import Aggregate


def rollout_figures(rollout: Rollout, aggregate: Aggregate) -> dict[str, Tensor]:
    """Means over the responses of a rollout, each 0-d.

    aggregate: how the reward model scores a response. kl: nats a response, the k1 estimate summed
    over its tokens. segment_length: tokens; a terminator that belongs to no segment does not count.
    """
    mask = rollout.response_mask
    lengths, segments = mask.sum(1).float(), rollout.ends.sum(1).float()
    kl = ((rollout.logprobs - rollout.reference_logprobs) * mask).sum(1)
    scores = aggregate_segments(rollout.token_values, rollout.ends, aggregate)
    return {
        "rm_score": scores.mean(),
        "rm_score_std": scores.std(correction=0),
        "kl": kl.mean(),
        "kl_per_token": kl.sum() / lengths.sum(),
        "response_length": lengths.mean(),
        "terminated": rollout.terminated.float().mean(),
        "segments_per_response": segments.mean(),
        "segment_length": (segment_ids(rollout.ends, mask) >= 0).sum() / segments.sum(),
    }


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
        values = rollout.token_values[row].tolist()
        rewards = earned[row].cumsum(0).tolist()
        segments = [
            {
                "text": text,
                "tokens": end + 1 - start,
                "value": values[end],
                "reward": rewards[end] - (rewards[start - 1] if start else 0.0),
            }
            for text, start, end in zip(texts, starts, ends, strict=False)
        ]
        shown.append({"prompt": prompts[row], "segments": segments})
    return shown
