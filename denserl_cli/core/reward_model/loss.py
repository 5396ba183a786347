"""The segment reward model: a scalar head at every token, segment rewards, their loss."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from torch import Tensor
from torch.nn.functional import logsigmoid

from denserl_cli.core.errors import DenserlError
from denserl_cli.core.precision import at_least_float32

if TYPE_CHECKING:
    pass


def aggregate_segments(
    token_values: Tensor, ends: Tensor, how: Literal["mean", "sum", "last"] = "mean"
) -> Tensor:
    """Score each sequence by the rewards of its segments, the values at their ends (method §3).

    token_values: (B, T), the reward head at every token. ends: (B, T) bool. Returns (B,), at least
    float32; a row without ends scores 0, with gradient 0. Raises DenserlError for an unknown `how`.
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

    chosen_score, rejected_score, margin: (pairs,). Returns a scalar, at least float32; 0 of no
    pairs.
    """
    difference = at_least_float32(chosen_score) - rejected_score
    if margin is not None:
        difference = difference - margin
    return -logsigmoid(difference).sum() / max(len(difference), 1)
