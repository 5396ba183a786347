"""Correction for responses that another distribution drew than the one that is trained.

A sampling engine computes with other kernels, or other precision, than the trainer, and with top_p
below 1 it leaves out unlikely tokens. So tokens come from a distribution μ that is not quite the
policy π_old, and the policy gradient is that of another objective. Truncated importance weights
min(π_old / μ, cap) correct it at a bounded variance (Ionides 2008, Truncated Importance Sampling;
Yao et al. 2025, Your Efficient RL Framework Secretly Brings You Off-Policy RL Training).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from denserl_cli.core.precision import at_least_float32

Importance = Literal["none", "token", "sequence"]


def importance_weights(
    logprobs: Tensor,
    behaviour_logprobs: Tensor,
    response_mask: Tensor,
    *,
    level: Importance,
    cap: float,
) -> Tensor | None:
    """Truncated importance weights of the tokens of a rollout.

    Args:
        logprobs: (R, T), nats, log π_old: the policy's before its update.
        behaviour_logprobs: (R, T), nats, log μ: of the distribution that each token was drawn from.
        response_mask: (R, T) bool.
        level: `token` weighs each token by its own ratio π_old / μ, which bounds the variance and
            leaves a bias through the states that μ visits; `sequence` all tokens of a response by
            the product of their ratios, which has no such bias; `none` weighs nothing.
        cap: The largest weight.

    Returns:
        (R, T), 0 where masked; None with `none`. No gradient passes through them.
    """
    if level == "none":
        return None
    ratio = _log_ratio(logprobs, behaviour_logprobs, response_mask)
    if level == "sequence":
        ratio = ratio.sum(1, keepdim=True).expand_as(ratio)
    capped = ratio.clamp(max=torch.tensor(cap).log().item())
    return capped.exp().masked_fill(~response_mask, 0).detach()


def mismatch_metrics(
    logprobs: Tensor,
    behaviour_logprobs: Tensor,
    response_mask: Tensor,
    *,
    level: Importance,
    cap: float,
) -> dict[str, Tensor]:
    """How far the distribution that was sampled from is from the trainer's.

    Args:
        logprobs: As in `importance_weights`.
        behaviour_logprobs: As in `importance_weights`.
        response_mask: As in `importance_weights`.
        level: As in `importance_weights`.
        cap: As in `importance_weights`.

    Returns:
        Metrics by name, 0-d each. mismatch_kl: nats a token, KL(μ ‖ π_old) by the mean of
        log μ - log π_old, which may be a little below 0. importance_mean: of the weights.
        importance_capped: share of the tokens whose weight is the cap; both with weights alone.
    """
    ratio = _log_ratio(logprobs, behaviour_logprobs, response_mask)
    tokens = response_mask.sum().clamp(min=1)
    metrics = {"mismatch_kl": -ratio.sum() / tokens}
    weights = importance_weights(logprobs, behaviour_logprobs, response_mask, level=level, cap=cap)
    if weights is not None:
        capped = (weights >= cap * (1 - 1e-6)) & response_mask
        metrics |= {
            "importance_mean": weights.sum() / tokens,
            "importance_capped": capped.sum() / tokens,
        }
    return metrics


def _log_ratio(logprobs: Tensor, behaviour_logprobs: Tensor, response_mask: Tensor) -> Tensor:
    """Log π_old - log μ, 0 where masked: (R, T)."""
    return (at_least_float32(logprobs) - behaviour_logprobs).masked_fill(~response_mask, 0)
