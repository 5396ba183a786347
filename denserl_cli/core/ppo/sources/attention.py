"""A reward model's score, shared by its own attention (ABC, arXiv 2402.00782)."""

from __future__ import annotations

from torch import Tensor


def attention(attention: Tensor, score: Tensor) -> Tensor:
    """Each token's share of the score: the attention that the reward model pays it (Chan et al.).

    Args:
        attention: (B, T), of the last layer's last token to each response token, the mean of the
            heads, which adds up to 1 in a row that has tokens.
        score: (B,).

    Returns:
        (B, T), which add up to the score.
    """
    return attention * score[:, None]
