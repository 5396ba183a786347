"""Dense rewards of a rollout: normalise, spread, penalise (method §5)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from denserl_cli.core.errors import DenserlError
from denserl_cli.core.segmentation import segment_ids

if TYPE_CHECKING:
    from denserl_cli.core.normalizer import LocationNormalizer


def spread_rewards(
    token_values: Tensor,
    ends: Tensor,
    response_mask: Tensor,
    *,
    normalizer: LocationNormalizer | None = None,
    interpolation: Literal["even", "repeat", "end"] = "even",
    segment_total: Literal["sum", "mean"] = "sum",
    length_normalize: bool = False,
    clip: float = 10.0,
) -> Tensor:
    """Turn the reward model's values into a reward for each token (method §5).

    Normalise by location, divide by the number of segments (`mean`), spread inside the segment,
    divide by the response length (`length_normalize`), clamp to ± clip, in this order.

    token_values: (B, T), the reward head at every token; only those at ends count. ends,
    response_mask: (B, T) bool. interpolation: `even` gives each token of a segment reward / length,
    `repeat` the whole reward, `end` gives it to the last token. Returns (B, T), at least float32,
    0 outside every segment. Raises DenserlError for an unknown interpolation or segment_total.
    """
    values = token_values.to(torch.promote_types(token_values.dtype, torch.float32))
    rewards = segment_rewards(values, ends, normalizer)
    if segment_total == "mean":
        rewards.div_(ends.sum(1, keepdim=True).clamp(min=1))
    elif segment_total != "sum":
        raise DenserlError(f"unknown segment_total {segment_total!r}", hint="use sum or mean")
    if interpolation in ("even", "repeat"):
        rewards = _fill_segments(rewards, ends, response_mask, divide=interpolation == "even")
    elif interpolation != "end":
        raise DenserlError(
            f"unknown interpolation {interpolation!r}", hint="use even, repeat or end"
        )
    if length_normalize:
        rewards.div_(response_mask.sum(1, keepdim=True).clamp(min=1))
    return rewards.clamp_(-clip, clip)


def penalize_kl(
    rewards: Tensor,
    logprobs: Tensor,
    reference_logprobs: Tensor,
    response_mask: Tensor,
    kl_coef: float,
) -> Tensor:
    """Subtract kl_coef * (log π - log π_ref), k1, from every response token's reward (method §5).

    All tensors (B, T), nats, response_mask bool. Masked columns keep their reward; a negative
    kl_coef counts as 0. Returns (B, T).
    """
    log_ratio = (logprobs - reference_logprobs).masked_fill(~response_mask, 0)
    return rewards - max(kl_coef, 0.0) * log_ratio


def replace_penalized(
    rewards: Tensor,
    response_mask: Tensor,
    terminated: Tensor,
    *,
    missing_eos_penalty: float | None = None,
    max_response_tokens: int | None = None,
    overlong_penalty: float | None = None,
    last_token_only: bool = False,
) -> Tensor:
    """Give responses that did not end, or ended too late, a penalty instead of rewards (method §5).

    rewards: (B, T). response_mask: (B, T) bool. terminated: (B,) bool. A response of more than
    `max_response_tokens` tokens gets `overlong_penalty`, which outranks `missing_eos_penalty`. The
    penalty goes to every response token, or (bandit) to the last one alone with 0 elsewhere; masked
    columns of a penalised row are 0. Returns (B, T). Raises DenserlError when only one of
    max_response_tokens and overlong_penalty is given.
    """
    if (max_response_tokens is None) != (overlong_penalty is None):
        raise DenserlError(
            "max_response_tokens and overlong_penalty belong together", hint="set both or neither"
        )
    number = response_mask.cumsum(1)
    length = number[:, -1:]
    paid = response_mask & (number == length) if last_token_only else response_mask
    if missing_eos_penalty is not None:
        rewards = torch.where(terminated[:, None], rewards, paid * missing_eos_penalty)
    if max_response_tokens is not None and overlong_penalty is not None:
        rewards = torch.where(length <= max_response_tokens, rewards, paid * overlong_penalty)
    return rewards


@dataclass
class AdaptiveKL:
    """The weight of the KL penalty, steered to a target (Ziegler et al. 2019; method §5).

    coef: the current weight, all the state there is; save it, and set it to resume. target: mean
    per-token KL in nats; None keeps coef as it is. horizon: in responses; over one horizon an error
    of 20 % or more changes coef by about 20 %.
    """

    coef: float
    target: float | None = None
    horizon: int = 10_000

    def update(self, kl: float, responses: int) -> None:
        """Steer after `responses` responses whose mean per-token KL was `kl` nats."""
        if self.target is not None:
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.coef *= 1 + error * responses / self.horizon


def segment_rewards(values: Tensor, ends: Tensor, normalizer: LocationNormalizer | None) -> Tensor:
    """Normalise each segment's value by its location, method §4. (B, T), 0 off the ends."""
    if normalizer is not None:
        location = locations(ends, values.dtype)
        values = (values - normalizer.mean(location)) / normalizer.std(location)
    return values.masked_fill(~ends, 0)


def locations(ends: Tensor, dtype: torch.dtype) -> Tensor:
    """Where each segment k of K lies, (k+1)/K, at its end; 1 elsewhere. (B, T)."""
    count = ends.sum(1, keepdim=True).clamp(min=1)
    return (ends.cumsum(1).to(dtype) / count).masked_fill(~ends, 1)


def _fill_segments(rewards: Tensor, ends: Tensor, response_mask: Tensor, *, divide: bool) -> Tensor:
    """Give every token its segment's reward, over the segment's length if `divide`. (B, T)."""
    ids = segment_ids(ends, response_mask)
    inside = ids >= 0
    # row k of a table of at most T segments; outsiders add 0 to the first
    index = ids.clamp_(min=0)
    table = torch.zeros_like(rewards).scatter_add_(1, index, rewards)
    if divide:
        lengths = torch.zeros_like(rewards).scatter_add_(1, index, inside.to(rewards.dtype))
        table.div_(lengths.clamp_(min=1))
    return table.gather(1, index).masked_fill_(~inside, 0)
