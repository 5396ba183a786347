"""Which rows make a batch, and the tensors of a batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from denserl_cli.core.distributed import world_size
from denserl_cli.core.errors import DenserlError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    Ids = np.ndarray | Sequence[int]


PASS_TOKENS = {"cpu": 64, "cuda": 1024}
"""What one more forward pass costs, in tokens of padding (docs/performance.md)."""


@dataclass(frozen=True, eq=False)
class EncodedPairRow:
    """A pair as int32 ids, cut to the length limits; responses end with the terminator."""

    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray
    margin: float | None
    origin: str
    group: bytes = b""
    """Digest of the whole prompt: the same for all pairs of one prompt, however they were cut."""
    subset: str | None = None
    """The part of a benchmark that the pair belongs to."""
    truncated: bool = False
    """Whether prompt or responses were cut."""


@dataclass(frozen=True, eq=False)
class SequenceBatch:
    """Sequences [padding, prompt, response, padding]; all responses start in one column.

    Response column j is sequence column `prompt_width + j`: the (R, T) window of any (R, S) tensor
    is its slice [:, prompt_width:]. Masks come from lengths, so ids may equal `pad_id` anywhere.
    """

    input_ids: Tensor
    """(R, S) int64."""
    attention_mask: Tensor
    """(R, S) bool, True on prompt and response."""
    response_mask: Tensor
    """(R, S) bool, True on the response, terminator included."""
    position_ids: Tensor
    """(R, S) int64, counted from a sequence's first token; unspecified on padding."""
    prompt_width: int
    """Columns in front of the responses: the length of the longest prompt."""


@dataclass(frozen=True, eq=False)
class PairBatch(SequenceBatch):
    """The chosen sequences of B pairs, then their rejected ones: R = 2B."""

    margin: Tensor | None
    """(B,) float32, 0 for a pair without margin; None where no pair has one."""


def step_count(count: int, batch_size: int, *, epochs: float, field: str) -> int:
    """Number of full batches in some passes over the rows.

    field: recipe field of the batch size, for the error. Raises DenserlError when the rows do not
    make one batch.
    """
    total = round(epochs * count)
    if min(count, total) < batch_size:
        raise DenserlError(
            f"not enough data for one batch: {min(count, total)} rows, {field} is {batch_size}",
            hint=f"lower {field} or give more data",
        )
    return total // batch_size


def global_batches(
    count: int,
    batch_size: int,
    *,
    epochs: float = 1.0,
    seed: int,
    field: str = "reward_model.batch_size",
) -> list[np.ndarray]:
    """Row numbers of each optimizer step; every epoch is a new permutation of all rows.

    What is left at the end of an epoch goes into the first batch of the next, so that every step is
    full; what is left at the very end is dropped. field: recipe field of the batch size, for the
    error. Raises DenserlError when the rows do not make one batch.
    """
    steps = step_count(count, batch_size, epochs=epochs, field=field)
    order = np.concatenate(
        [
            np.random.default_rng([seed, epoch]).permutation(count)
            for epoch in range(math.ceil(epochs))
        ]
    )
    return list(order[: steps * batch_size].reshape(steps, batch_size))


def by_length(
    lengths: Sequence[int] | np.ndarray, indices: np.ndarray, size: int
) -> list[np.ndarray]:
    """Cut a batch into parts of `size` rows of similar length, the longest first.

    lengths: (N,) of the rows in `indices` (N,), in the same order. For what generates: its cost is
    the number of calls, whatever the prompts' lengths.
    """
    ordered = _longest_first(lengths, indices)[1]
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]


def micro_batches(
    lengths: Sequence[int] | np.ndarray, indices: np.ndarray, size: int
) -> list[np.ndarray]:
    """Cut a batch into parts of at most `size` rows with the least padding, the longest first.

    lengths: (N,) of the rows in `indices` (N,), in the same order. Each part is padded to its
    longest row, and each further pass has a cost of its own (`PASS_TOKENS`): of all cuts of the
    ordered rows, the cheapest one is taken. With several processes, every one of them gets a part
    of each turn (`distributed.share`), and a turn takes as long as its longest part.
    """
    ordered_lengths, ordered = _longest_first(lengths, indices)
    ranks = world_size()
    heads = ordered_lengths[::ranks]  # the longest row where a turn may begin
    turns = len(heads)
    pass_cost = PASS_TOKENS[_device_type()]
    cheapest = np.zeros(turns + 1)  # of the rows from each place on
    rows = np.ones(turns, int)  # that a part of the turn has there
    for place in range(turns - 1, -1, -1):
        most = min(size, turns - place)
        costs = heads[place] * np.arange(1, most + 1) + cheapest[place + 1 : place + most + 1]
        rows[place] = costs.argmin() + 1
        cheapest[place] = costs.min() + pass_cost
    parts: list[np.ndarray] = []
    place = 0
    while place < turns:
        start, stop = place * ranks, (place + rows[place]) * ranks
        turn = ordered[start:stop]
        parts += np.array_split(turn, min(ranks, len(turn)))
        place += rows[place]
    return parts


def _longest_first(
    lengths: Sequence[int] | np.ndarray, indices: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    order = np.argsort(-np.asarray(lengths), kind="stable")
    return np.asarray(lengths)[order], np.asarray(indices)[order]


def _device_type() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def collate_sequences(
    prompts: Sequence[Ids],
    responses: Sequence[Ids],
    pad_id: int,
    device: torch.device | str | None = None,
) -> SequenceBatch:
    """Tensors of R prompts and their responses, prompts padded on the left, responses right."""
    return SequenceBatch(*_columns(prompts, responses, pad_id, device))


def collate_pairs(
    rows: Sequence[EncodedPairRow], pad_id: int, device: torch.device | str | None = None
) -> PairBatch:
    """Tensors of B pairs: the chosen sequences, then the rejected ones."""
    import torch

    prompts = [row.prompt for row in rows] * 2
    responses = [row.chosen for row in rows] + [row.rejected for row in rows]
    margin = None
    if any(row.margin is not None for row in rows):
        margins = [row.margin or 0.0 for row in rows]
        margin = torch.tensor(margins, dtype=torch.float32, device=device)
    return PairBatch(*_columns(prompts, responses, pad_id, device), margin)


def _columns(
    prompts: Sequence[Ids],
    responses: Sequence[Ids],
    pad_id: int,
    device: torch.device | str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """The fields of a SequenceBatch."""
    import torch

    width = max(map(len, prompts))
    shape = (len(prompts), width + max(map(len, responses)))
    ids = np.full(shape, pad_id, np.int64)
    attended, response_mask = np.zeros(shape, bool), np.zeros(shape, bool)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        start, stop = width - len(prompt), width + len(response)
        ids[row, start:width], ids[row, width:stop] = prompt, response
        attended[row, start:stop], response_mask[row, width:stop] = True, True
    positions = np.maximum(attended.cumsum(1) - 1, 0)
    arrays = (ids, attended, response_mask, positions)
    first, second, third, fourth = (torch.from_numpy(array).to(device) for array in arrays)
    return first, second, third, fourth, width
