"""A score shared among segments by their Shapley values (SCAR, arXiv 2505.20417)."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

EXACT = 6
"""Most segments of which all coalitions are scored; above, permutations are sampled."""


def shapley(shapley_values: Tensor) -> Tensor:
    """The Shapley value of each segment, at its end.

    Args:
        shapley_values: (B, T), 0 outside the ends.

    Returns:
        (B, T), as given: rewards of segments. They add up to v(all) - v(none).
    """
    return shapley_values


def all_coalitions(players: int) -> Tensor:
    """Every coalition of K players: (2^K, K) bool; player i is in number n where bit i is set."""
    numbers = torch.arange(2**players)
    return (numbers[:, None] >> torch.arange(players) & 1).bool()


def exact_shapley(worth: Tensor) -> Tensor:
    """Shapley values from the worth of every coalition.

    Args:
        worth: (2^K,), of the coalitions in the order of `all_coalitions`.

    Returns:
        (K,), which add up to worth[-1] - worth[0].
    """
    players = int(math.log2(len(worth)))
    members = all_coalitions(players).to(worth.device)
    sizes = members.sum(1)
    orders = [math.factorial(s) * math.factorial(players - s - 1) for s in range(players)]
    weight = torch.tensor(orders, dtype=worth.dtype, device=worth.device)
    weight = weight / math.factorial(players)
    numbers = torch.arange(len(worth), device=worth.device)
    found = []
    for player in range(players):
        without = numbers[~members[:, player]]
        gain = worth[without + 2**player] - worth[without]
        found.append((weight[sizes[without]] * gain).sum())
    return torch.stack(found)


def permutations(players: int, count: int, seed: bytes) -> np.ndarray:
    """Orders in which players join, drawn from a seed alone: (count, K)."""
    generator = np.random.default_rng(np.frombuffer(seed, np.uint8))
    return np.stack([generator.permutation(players) for _ in range(count)])


def joined(orders: np.ndarray) -> Tensor:
    """The coalitions that arise as players join one by one, the empty and the whole one left out.

    Args:
        orders: (M, K).

    Returns:
        (M * (K - 1), K) bool, order by order.
    """
    ranks = np.argsort(orders, axis=1)
    sizes = np.arange(1, orders.shape[1])
    members = ranks[:, None, :] < sizes[None, :, None]
    return torch.from_numpy(members.reshape(-1, orders.shape[1]))


def sampled_shapley(worth: Tensor, empty: Tensor, whole: Tensor, orders: np.ndarray) -> Tensor:
    """The mean gain that each player brings when it joins (Castro et al. 2009).

    Args:
        worth: (M * (K - 1),), of the coalitions of `joined`.
        empty: 0-d, worth of nobody.
        whole: 0-d, worth of all.
        orders: (M, K), as in `joined`.

    Returns:
        (K,), which add up to whole - empty.
    """
    count, players = orders.shape
    steps = worth.reshape(count, players - 1)
    along = torch.cat([empty.expand(count, 1), steps, whole.expand(count, 1)], dim=1)
    gains = along.diff(dim=1)
    who = torch.from_numpy(orders).to(worth.device)
    return torch.zeros_like(gains).scatter_(1, who, gains).mean(0)
