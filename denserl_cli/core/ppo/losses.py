"""The clipped losses of PPO (Schulman et al. 2017; method §5)."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from denserl_cli.core.errors import DenserlError
from denserl_cli.core.precision import at_least_float32

Reduce = Literal["sequence", "token"]

_HIGHEST = 80.0
"""Log-ratios are lowered to this: the ratio is finite, and 0 times it, in a clipped gradient, 0."""


class LossOutput(NamedTuple):
    """A scalar loss, and metrics of the update: detached 0-d tensors by name."""

    loss: Tensor
    metrics: dict[str, Tensor]


def masked_mean(values: Tensor, mask: Tensor, reduce: Reduce) -> Tensor:
    """Mean over the tokens that count; 0, with gradient 0, where none does.

    Args:
        values: (B, T).
        mask: (B, T) bool.
        reduce: `sequence` takes each row's mean and then the mean of the rows that are not empty,
            `token` the mean of all tokens.

    Returns:
        A scalar, at least float32.

    Raises:
        DenserlError: Unknown reduce.
    """
    values = at_least_float32(values).masked_fill(~mask, 0)
    if reduce == "token":
        return values.sum() / mask.sum().clamp(min=1)
    if reduce != "sequence":
        raise DenserlError(f"unknown reduce {reduce!r}", hint="use sequence or token")
    row_means = values.sum(1) / mask.sum(1).clamp(min=1)
    return row_means.sum() / mask.any(1).sum().clamp(min=1)


def clipped_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    *,
    clip: float | None,
    reduce: Reduce = "sequence",
    weights: Tensor | None = None,
) -> LossOutput:
    """PPO's pessimistic surrogate -min(r A, clamp(r, 1 ± clip) A), r = π / π_old.

    Args:
        logprobs: (B, T), nats, log π of each token.
        old_logprobs: (B, T), nats, log π_old.
        advantages: (B, T), A.
        response_mask: (B, T) bool.
        clip: How far the ratio may leave 1; None does not clip it.
        reduce: As in `masked_mean`.
        weights: (B, T), factors of each token's term, such as `importance_weights`; None: 1.

    Returns:
        The loss, and metrics over all tokens: clip_fraction (share with |r - 1| > clip), approx_kl
        (KL of the old policy to the new: mean of r - 1 - log r, never negative), ratio_max (0 where
        no token counts).
    """
    clip = math.inf if clip is None else clip
    # Masked columns may hold anything: emptied first, they cannot put inf * 0 into the gradient.
    log_ratio = (at_least_float32(logprobs) - old_logprobs).masked_fill(~response_mask, 0)
    log_ratio = log_ratio.clamp(max=_HIGHEST)
    advantages = advantages.masked_fill(~response_mask, 0)
    ratio = log_ratio.exp()
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    if weights is not None:
        surrogate = surrogate * weights
    with torch.no_grad():
        clipped = ((ratio - 1).abs() > clip).to(ratio.dtype)
        metrics = {
            "clip_fraction": masked_mean(clipped, response_mask, "token"),
            "approx_kl": masked_mean(ratio - 1 - log_ratio, response_mask, "token"),
            "ratio_max": pad(ratio.masked_fill(~response_mask, 0).flatten(), (0, 1)).max(),
        }
    return LossOutput(-masked_mean(surrogate, response_mask, reduce), metrics)


def clipped_value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    response_mask: Tensor,
    *,
    clip: float | None,
    reduce: Reduce = "sequence",
) -> LossOutput:
    """Half the larger squared error of the value and of the value kept within old ± clip.

    Args:
        values: (B, T).
        old_values: (B, T), those of the rollout.
        returns: (B, T), what the values should be.
        response_mask: (B, T) bool.
        clip: How far a value may leave the old one; None gives half the squared error.
        reduce: As in `masked_mean`.

    Returns:
        The loss, and the metric clip_fraction: the share of tokens whose value moved by more than
        `clip`.
    """
    clip = math.inf if clip is None else clip
    values = at_least_float32(values).masked_fill(~response_mask, 0)
    old_values = old_values.masked_fill(~response_mask, 0)
    returns = returns.masked_fill(~response_mask, 0)
    move = values - old_values
    kept_near = old_values + move.clamp(-clip, clip)
    error = torch.maximum((values - returns).square(), (kept_near - returns).square())
    with torch.no_grad():
        clipped = (move.abs() > clip).to(values.dtype)
        metrics = {"clip_fraction": masked_mean(clipped, response_mask, "token")}
    return LossOutput(0.5 * masked_mean(error, response_mask, reduce), metrics)
