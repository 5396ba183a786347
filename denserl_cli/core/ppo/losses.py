"""The clipped losses of PPO (Schulman et al. 2017; method §5)."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from denserl_cli.core.errors import DenserlError
from denserl_cli.core.precision import at_least_float32

Reduce = Literal["sequence", "token", "constant"]

_HIGHEST = 80.0
"""Log-ratios are lowered to this: the ratio is finite, and 0 times it, in a clipped gradient, 0."""


class LossOutput(NamedTuple):
    """A scalar loss, and metrics of the update: detached 0-d tensors by name."""

    loss: Tensor
    metrics: dict[str, Tensor]


def masked_mean(values: Tensor, mask: Tensor, reduce: Reduce, length: int | None = None) -> Tensor:
    """Mean over the tokens that count; 0, with gradient 0, where none does.

    Args:
        values: (B, T).
        mask: (B, T) bool.
        reduce: `sequence` takes each row's mean and then the mean of the rows that are not empty,
            `token` the mean of all tokens, `constant` each row's sum over `length` and then the
            mean of the rows that are not empty (Dr. GRPO, arXiv 2503.20783).
        length: The tokens that `constant` divides by.

    Returns:
        A scalar, at least float32.

    Raises:
        DenserlError: Unknown reduce, or `constant` without a length.
    """
    values = at_least_float32(values).masked_fill(~mask, 0)
    if reduce == "token":
        return values.sum() / mask.sum().clamp(min=1)
    if reduce == "constant":
        if not length:
            raise DenserlError("reduce constant has no length", hint="give the tokens to divide by")
        row_means = values.sum(1) / length
    elif reduce == "sequence":
        row_means = values.sum(1) / mask.sum(1).clamp(min=1)
    else:
        hint = "use sequence, token or constant"
        raise DenserlError(f"unknown reduce {reduce!r}", hint=hint)
    return row_means.sum() / mask.any(1).sum().clamp(min=1)


def clipped_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    *,
    clip: float | None,
    clip_high: float | None = None,
    dual_clip: float | None = None,
    reduce: Reduce = "sequence",
    length: int | None = None,
    weights: Tensor | None = None,
) -> LossOutput:
    """PPO's pessimistic surrogate -min(r A, clamp(r, 1 - clip, 1 + clip_high) A), r = π / π_old.

    Args:
        logprobs: (B, T), nats, log π of each token.
        old_logprobs: (B, T), nats, log π_old.
        advantages: (B, T), A.
        response_mask: (B, T) bool.
        clip: How far the ratio may leave 1; None does not clip it.
        clip_high: How far it may go above 1, where that is not `clip` (DAPO, arXiv 2503.14476).
        dual_clip: Where A < 0 the surrogate is no lower than this times A (arXiv 1912.09729); above
            1. None does not bound it.
        reduce: As in `masked_mean`.
        length: As in `masked_mean`.
        weights: (B, T), factors of each token's term, such as `importance_weights`; None: 1.

    Returns:
        The loss, and metrics over all tokens: clip_fraction (share with r outside the range),
        approx_kl (KL of the old policy to the new: mean of r - 1 - log r, never negative),
        ratio_max (0 where no token counts).
    """
    clip = math.inf if clip is None else clip
    high = clip if clip_high is None else clip_high
    # Masked columns may hold anything: emptied first, they cannot put inf * 0 into the gradient.
    log_ratio = (at_least_float32(logprobs) - old_logprobs).masked_fill(~response_mask, 0)
    log_ratio = log_ratio.clamp(max=_HIGHEST)
    advantages = advantages.masked_fill(~response_mask, 0)
    ratio = log_ratio.exp()
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + high) * advantages)
    if dual_clip is not None:
        bounded = torch.maximum(surrogate, dual_clip * advantages)
        surrogate = torch.where(advantages < 0, bounded, surrogate)
    if weights is not None:
        surrogate = surrogate * weights
    with torch.no_grad():
        clipped = ((ratio - 1 > high) | (1 - ratio > clip)).to(ratio.dtype)
        metrics = {
            "clip_fraction": masked_mean(clipped, response_mask, "token"),
            "approx_kl": masked_mean(ratio - 1 - log_ratio, response_mask, "token"),
            "ratio_max": pad(ratio.masked_fill(~response_mask, 0).flatten(), (0, 1)).max(),
        }
    return LossOutput(-masked_mean(surrogate, response_mask, reduce, length), metrics)


def kl_loss(
    logprobs: Tensor,
    reference_logprobs: Tensor,
    response_mask: Tensor,
    *,
    estimator: Literal["k2", "k3"],
    reduce: Reduce = "sequence",
    length: int | None = None,
) -> Tensor:
    """An estimate of KL(π ‖ π_ref) as a loss, from tokens that π drew.

    With d = log π - log π_ref: k2 = d² / 2, whose gradient is that of the KL on average; k3 =
    e^-d - 1 + d, never negative, without bias and with less variance than d.

    Args:
        logprobs: (B, T), nats, log π of each token.
        reference_logprobs: (B, T), nats, log π_ref.
        response_mask: (B, T) bool.
        estimator: k2 or k3.
        reduce: As in `masked_mean`.
        length: As in `masked_mean`.

    Returns:
        A scalar, nats a token, at least float32.

    Raises:
        DenserlError: Unknown estimator.
    """
    difference = at_least_float32(logprobs) - reference_logprobs
    difference = difference.masked_fill(~response_mask, 0)
    if estimator == "k2":
        return masked_mean(difference.square() / 2, response_mask, reduce, length)
    if estimator != "k3":
        raise DenserlError(f"unknown estimator {estimator!r} of a KL loss", hint="use k2 or k3")
    difference = difference.clamp(min=-_HIGHEST)
    return masked_mean((-difference).exp() - 1 + difference, response_mask, reduce, length)


def clipped_value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    response_mask: Tensor,
    *,
    clip: float | None,
    reduce: Reduce = "sequence",
    length: int | None = None,
) -> LossOutput:
    """Half the larger squared error of the value and of the value kept within old ± clip.

    Args:
        values: (B, T).
        old_values: (B, T), those of the rollout.
        returns: (B, T), what the values should be.
        response_mask: (B, T) bool.
        clip: How far a value may leave the old one; None gives half the squared error.
        reduce: As in `masked_mean`.
        length: As in `masked_mean`.

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
    return LossOutput(0.5 * masked_mean(error, response_mask, reduce, length), metrics)
