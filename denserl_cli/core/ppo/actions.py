"""What one action is: a token, or a segment as a macro action (MA-RLHF, arXiv 2410.02743)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from denserl_cli.core.precision import at_least_float32


class MacroActions(NamedTuple):
    """The segments of responses as actions.

    A terminator that belongs to no segment is an action of its own.

    Attributes:
        mask: (B, K) bool, the actions of each response, from the first column on.
        numbers: (B, T) int64, the action of each token; tokens that are masked have any.
        lengths: (B, K) int64, tokens of each action.
        tokens: (B, T) bool, the response mask.
    """

    mask: Tensor
    numbers: Tensor
    lengths: Tensor
    tokens: Tensor

    def total(self, rewards: Tensor) -> Tensor:
        """The sum of the rewards of each action's tokens. rewards: (B, T). Returns (B, K)."""
        rewards = at_least_float32(rewards).masked_fill(~self.tokens, 0)
        return rewards.new_zeros(self.mask.shape).scatter_add_(1, self.numbers, rewards)

    def mean(self, values: Tensor) -> Tensor:
        """The mean of the values of each action's tokens. values: (B, T). Returns (B, K)."""
        return self.total(values) / self.lengths.clamp(min=1)

    def spread(self, values: Tensor) -> Tensor:
        """The value of its action for each token. values: (B, K). Returns (B, T), 0 if masked."""
        return values.gather(1, self.numbers).masked_fill(~self.tokens, 0)


def macro_actions(ends: Tensor, response_mask: Tensor) -> MacroActions:
    """Segments as actions.

    Args:
        ends: (B, T) bool, of the segments.
        response_mask: (B, T) bool.

    Returns:
        Actions in T columns, most of them empty: nothing waits for the largest number of segments.
    """
    numbers = ends.cumsum(1) - ends.long()  # the ends before a token
    numbers = numbers.masked_fill(~response_mask, 0)
    lengths = torch.zeros_like(numbers).scatter_add_(1, numbers, response_mask.long())
    return MacroActions(lengths > 0, numbers, lengths, response_mask)
