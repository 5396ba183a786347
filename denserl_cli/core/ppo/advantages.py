"""Advantages of a rollout: generalized advantage estimation and whitening (method §5)."""

from __future__ import annotations

import torch
from torch import Tensor

from denserl_cli.core.precision import at_least_float32


def generalized_advantages(
    rewards: Tensor, values: Tensor, response_mask: Tensor, *, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Estimate advantages, and returns = advantages + values (Schulman et al. 2016; method §5).

    Nothing is bootstrapped after the last token.

    Args:
        rewards: (B, T), of each token.
        values: (B, T), the critic's value before each token, in the state in which it is chosen.
        response_mask: (B, T) bool. Masked rewards and values count as 0 and the recursion passes
            through them, so a masked token inside a response has an advantage that nothing uses.
        gamma: Discount of later rewards.
        lam: Decay of the temporal-difference errors, λ of generalized advantage estimation.

    Returns:
        Advantages and returns, (B, T) each, at least float32.
    """
    rewards = at_least_float32(rewards).masked_fill(~response_mask, 0)
    values = at_least_float32(values).masked_fill(~response_mask, 0)
    next_values = torch.cat((values[:, 1:], torch.zeros_like(values[:, :1])), dim=1)
    deltas = rewards + gamma * next_values - values
    advantages = torch.zeros_like(deltas)
    running = deltas.new_zeros(len(deltas))
    for t in reversed(range(deltas.shape[1])):
        running = deltas[:, t] + gamma * lam * running  # A_t = delta_t + gamma*lam*A_{t+1}
        advantages[:, t] = running
    return advantages, advantages + values


def whiten(values: Tensor, response_mask: Tensor) -> Tensor:
    """Shift and scale to mean 0 and population std 1 over all tokens that count.

    Args:
        values: (B, T).
        response_mask: (B, T) bool.

    Returns:
        (B, T), at least float32, 0 where masked; a single token, or values that are all the same,
        become 0.
    """
    values, count = at_least_float32(values), response_mask.sum().clamp(min=1)
    centred = values - values.masked_fill(~response_mask, 0).sum() / count
    centred = centred.masked_fill(~response_mask, 0)
    variance = centred.square().sum() / count
    return centred * variance.clamp(min=1e-8).rsqrt()
