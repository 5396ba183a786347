"""The reward model's own numbers: its value at each segment's end, or its score at the end."""

from __future__ import annotations

from torch import Tensor


def values(normal_values: Tensor) -> Tensor:
    """The reward model's value at the end of each segment, normalised by location (method §5).

    Args:
        normal_values: (B, T), 0 outside the ends.

    Returns:
        (B, T), as given: rewards of segments.
    """
    return normal_values


def score(score: Tensor, mask: Tensor) -> Tensor:
    """The reward model's score of the whole response, on its last token.

    Args:
        score: (B,).
        mask: (B, T) bool, of the response.

    Returns:
        (B, T).
    """
    number = mask.cumsum(1)
    last = mask & (number == number[:, -1:])
    return last * score[:, None]
