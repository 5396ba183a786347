"""Advantages from a critic (method §5) or from the other responses to a prompt; whitening."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from denserl_cli.core.precision import at_least_float32

Baseline = Literal["response", "token"]

_SAME = 1e-12
"""Returns with a variance of at most this share of their mean square differ by rounding alone."""


def generalized_advantages(
    rewards: Tensor, values: Tensor, response_mask: Tensor, *, gamma: float, lam: float | Tensor
) -> tuple[Tensor, Tensor]:
    """Estimate advantages, and returns = advantages + values (Schulman et al. 2016; method §5).

    Nothing is bootstrapped after the last token.

    Args:
        rewards: (B, T), of each token.
        values: (B, T), the critic's value before each token, in the state in which it is chosen.
        response_mask: (B, T) bool. Masked rewards and values count as 0 and the recursion passes
            through them, so a masked token inside a response has an advantage that nothing uses.
        gamma: Discount of later rewards.
        lam: Decay of the temporal-difference errors, λ of generalized advantage estimation; (B,)
            for one of each row.

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


def adaptive_lam(response_mask: Tensor, alpha: float) -> Tensor:
    """λ by length, 1 - 1 / (alpha · T) and at least 0, T a row's tokens (VAPO, arXiv 2504.05118).

    Args:
        response_mask: (B, T) bool.
        alpha: The share of a response over which an error reaches back.

    Returns:
        (B,), at least float32; 0 for an empty row.
    """
    lengths = at_least_float32(response_mask.sum(1)).clamp(min=1)
    return (1 - 1 / (alpha * lengths)).clamp(min=0)


def returns_to_go(rewards: Tensor, response_mask: Tensor, *, gamma: float) -> Tensor:
    """The discounted sum of the rewards from each token on.

    Args:
        rewards: (B, T); masked ones count as 0.
        response_mask: (B, T) bool.
        gamma: Discount of later rewards.

    Returns:
        (B, T), at least float32, 0 where masked.
    """
    values = torch.zeros_like(rewards)
    returns, _ = generalized_advantages(rewards, values, response_mask, gamma=gamma, lam=1.0)
    return returns.masked_fill(~response_mask, 0)


def group_advantages(
    rewards: Tensor,
    response_mask: Tensor,
    groups: Tensor,
    *,
    gamma: float,
    leave_one_out: bool = False,
    baseline: Baseline = "response",
    divide: bool = False,
) -> Tensor:
    """Returns-to-go less what the responses to the same prompt got, in place of a critic.

    `leave_one_out` is RLOO (arXiv 2402.14740), `divide` GRPO (2402.03300), neither Dr. GRPO
    (2503.20783); the baseline of a token is PURE's (2504.15275).

    Args:
        rewards: (B, T), of each token.
        response_mask: (B, T) bool.
        groups: (B,) int64 from 0 to less than B, the same for responses to the same prompt.
        gamma: Discount of later rewards.
        leave_one_out: The baseline of a response is the mean of the others, not of all.
        baseline: response: the mean return of a whole response, which every token's return-to-go is
            compared with. token: the mean reward of a token, for each token that is left.
        divide: Divide by the population std of the group's whole returns.

    Returns:
        (B, T), at least float32; 0 where masked, in a group of one and, with `divide`, in a group
        whose returns are all the same.
    """
    returns = returns_to_go(rewards, response_mask, gamma=gamma)
    whole, size = returns[:, 0], _over_groups(torch.ones_like(returns[:, 0]), groups)

    def mean(values: Tensor, weights: Tensor) -> Tensor:
        """Weighted by length or number, of each response's group or of the others in it: (B,)."""
        own = float(leave_one_out)
        total = _over_groups(values, groups) - own * values
        return total / (_over_groups(weights, groups) - own * weights).clamp(min=1)

    if baseline == "token":
        paid = at_least_float32(rewards).masked_fill(~response_mask, 0).sum(1)
        typical = mean(paid, response_mask.sum(1).to(paid.dtype))
        advantages = returns_to_go(rewards - typical[:, None], response_mask, gamma=gamma)
    else:
        advantages = returns - mean(whole, torch.ones_like(whole))[:, None]
    compared = size > 1
    if divide:
        centre = _over_groups(whole, groups) / size
        variance = _over_groups((whole - centre).square(), groups) / size
        compared = compared & (variance > _SAME * _over_groups(whole.square(), groups) / size)
        advantages = advantages / variance.masked_fill(~compared, 1).sqrt()[:, None]
    return advantages.masked_fill(~(response_mask & compared[:, None]), 0)


def _over_groups(values: Tensor, groups: Tensor) -> Tensor:
    """The sum of the values over each row's group: (B,)."""
    return torch.zeros_like(values).index_add_(0, groups, values)[groups]
