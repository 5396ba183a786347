"""The preference loss between the scores of two responses (method §3)."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from denserl_cli.core.precision import at_least_float32
from denserl_cli.core.segmentation import aggregate_segments

__all__ = ["aggregate_segments", "preference_loss"]


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
