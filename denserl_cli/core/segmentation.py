"""Segments of responses from the entropies of the reference (method §2)."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from denserl_cli.core.errors import DenserlError
from denserl_cli.core.precision import at_least_float32


def segment_ends(
    entropy: Tensor,
    response_mask: Tensor,
    *,
    granularity: Literal["segment", "token", "bandit"],
    cutoff: float | None = None,
    terminated: Tensor | None = None,
) -> Tensor:
    """Mark the tokens that end a segment (method §2).

    Args:
        entropy: (B, T), nats, of the reference's next-token distribution after each response token.
        response_mask: (B, T) bool; True for the response's tokens, a row may be empty.
        granularity: One reward for each segment, each token or each response.
        cutoff: Nats; a segment ends where the entropy is above it. Needed by `segment`, ignored by
            the others.
        terminated: (B,) bool, whether the last response token is a terminator; None: all are. An
            unterminated row's last token is an ordinary one and ends the last segment.

    Returns:
        (B, T) bool, False where masked.

    Raises:
        DenserlError: Unknown granularity, or `segment` without a cutoff.
    """
    assert entropy.shape == response_mask.shape
    number, closing = token_numbers(response_mask, terminated)
    if granularity == "bandit":
        return response_mask & (number == response_mask.sum(1, keepdim=True))
    if granularity == "token":
        return response_mask & (number <= closing)
    if granularity != "segment":
        raise DenserlError(
            f"unknown granularity {granularity!r}", hint="use segment, token or bandit"
        )
    if cutoff is None or math.isnan(cutoff):
        raise DenserlError(
            f"granularity segment needs a cutoff in nats, not {cutoff}",
            hint="choose one by hand, or with `denserl segment --calibrate LENGTH`",
        )
    return _closed(at_least_float32(entropy) > cutoff, number, closing, response_mask)


def ends_after(cuts: Tensor, response_mask: Tensor, terminated: Tensor | None = None) -> Tensor:
    """The segment ends of responses that are cut after certain tokens (method §2).

    The last segment ends on the last token before the terminator, which belongs to no segment.

    Args:
        cuts: (B, T) bool, tokens after which a rule cuts; masked ones are ignored.
        response_mask: (B, T) bool.
        terminated: As in `segment_ends`.

    Returns:
        (B, T) bool.
    """
    return _closed(cuts, *token_numbers(response_mask, terminated), response_mask)


def segment_ids(ends: Tensor, response_mask: Tensor) -> Tensor:
    """Number the segments of each response from 0.

    Args:
        ends: (B, T) bool, of the segments.
        response_mask: (B, T) bool.

    Returns:
        (B, T) int64, the number of each token's segment; -1 outside every segment (a terminator, a
        masked column).
    """
    ends_before = ends.cumsum(1)
    count = ends_before[:, -1:].clone()
    ends_before.add_(ends, alpha=-1)
    return ends_before.masked_fill_(~response_mask | (ends_before >= count), -1)


def calibrate_cutoff(
    entropy: Tensor, response_mask: Tensor, length: float, terminated: Tensor | None = None
) -> float:
    """Find the cutoff whose mean segment length over the batch is closest to `length` tokens.

    The candidates are 0 and each entropy that occurs: between two neighbours the segments do not
    change.

    Args:
        entropy: (B, T), nats, as in `segment_ends`.
        response_mask: (B, T) bool.
        length: Wanted mean length of the segments in tokens, 1 or more.
        terminated: As in `segment_ends`.

    Returns:
        The cutoff in nats.

    Raises:
        DenserlError: The length is below 1, or there are no response tokens.
    """
    if not length >= 1:
        raise DenserlError(
            f"a segment cannot have {length} tokens", hint="use a length of 1 or more"
        )
    number, closing = token_numbers(response_mask, terminated)
    rows = response_mask.any(1).sum()
    if rows == 0:
        raise DenserlError("no response tokens to calibrate a cutoff on")
    tokens = (response_mask & (number <= closing)).sum()
    values = entropy[response_mask & (number < closing)].sort().values
    candidates = torch.cat((values.new_zeros(1), values)).unique()
    above = len(values) - torch.searchsorted(values, candidates, right=True)
    mean_length = tokens.double() / (rows + above)  # one segment per row, one more per token above
    wanted = min(length, float(tokens))  # no segment is longer than all tokens
    return float(candidates[(mean_length - wanted).abs().argmin()])


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


def _closed(cuts: Tensor, number: Tensor, closing: Tensor, response_mask: Tensor) -> Tensor:
    return response_mask & ((cuts & (number < closing)) | (number == closing))


def token_numbers(response_mask: Tensor, terminated: Tensor | None) -> tuple[Tensor, Tensor]:
    """The number of each response token, from 1: (B, T), and of the last segment's end: (B, 1)."""
    number = response_mask.cumsum(1)
    length = number[:, -1:]
    if terminated is None:
        terminated = response_mask.new_ones(len(response_mask))
    excluded = terminated[:, None] & (length > 1)  # a lone token is its own segment
    return number, length - excluded.long()
