"""The score of a response from its segments' rewards, and the preference loss (method §3)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn.functional import logsigmoid

from denserl_cli.core.errors import DenserlError
from denserl_cli.core.precision import at_least_float32


def aggregate_segments(
    token_values: Tensor, ends: Tensor, how: Literal["mean", "sum", "last"] = "mean"
) -> Tensor:
    """Score each sequence by the rewards of its segments, the values at their ends (method §3).

    Args:
        token_values: (B, T), the scalar head at every token.
        ends: (B, T) bool, of the segments.
        how: The mean or the sum of the rewards, or that of the last segment.

    Returns:
        (B,), at least float32; a row without ends scores 0, with gradient 0.

    Raises:
        DenserlError: Unknown `how`.
    """
    values = at_least_float32(token_values)
    if how == "last":
        ends = ends & (ends.cumsum(1) == ends.sum(1, keepdim=True))
    elif how not in ("mean", "sum"):
        raise DenserlError(f"unknown aggregation {how!r}", hint="use mean, sum or last")
    total = values.masked_fill(~ends, 0).sum(1)
    return total / ends.sum(1).clamp(min=1) if how == "mean" else total


def preference_loss(
    chosen_score: Tensor, rejected_score: Tensor, margin: Tensor | None = None
) -> Tensor:
    """Bradley-Terry loss -log σ(chosen - rejected - margin), mean over pairs (method §3).

    Args:
        chosen_score: (pairs,).
        rejected_score: (pairs,).
        margin: (pairs,), by how much the chosen score should be higher; None: 0.

    Returns:
        A scalar, at least float32; 0 without pairs.
    """
    difference = at_least_float32(chosen_score) - rejected_score
    if margin is not None:
        difference = difference - margin
    return -logsigmoid(difference).sum() / max(len(difference), 1)
