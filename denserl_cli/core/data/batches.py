"""Which rows make a batch, and the tensors of a batch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from denserl_cli.core.system.distributed import world_size

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    Ids = np.ndarray | Sequence[int]


PASS_TOKENS = {"cpu": 64, "cuda": 1024}
"""What one more forward pass costs, in tokens of padding (docs/performance.md)."""
WIDTH_STEP = {"cpu": 1, "cuda": 64}
"""Batches are padded to a multiple of this, so that kernels planned for a shape meet it again."""


@dataclass(frozen=True, eq=False)
class EncodedPairRow:
    """A pair as int32 ids, cut to the length limits; responses end with the terminator.

    A ranking of more answers has the best one chosen, the worst one rejected.
    """

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
    others: tuple[np.ndarray, ...] = ()
    """The answers of a ranking between its best and its worst one, the better first."""


@dataclass(frozen=True, eq=False)
class Packing:
    """Where R sequences are in one row of N tokens (`packing.pack_sequences`).

    A prompt is there once, before the first of its responses; each of its other sequences has its
    response alone in the row, and attention reads the prompt where it is.
    """

    own: list[int]
    """Tokens of each sequence in the row, in the row's order; their sum is N."""
    whole: list[int]
    """Tokens of each sequence with its prompt; their sum is M."""
    holders: list[int]
    """Which sequence has the prompt of each; its own number where it has its prompt itself."""
    position_ids: Tensor
    """(1, N) int64, the place of each token in its sequence."""
    tokens: Tensor | None
    """(M,) int64, where the tokens of the whole sequences are in the row; None: M = N."""
    cumulative: Tensor
    """(2, R + 1) int32, cumulative sums of `own` and of `whole`, from 0."""


@dataclass(frozen=True, eq=False)
class SequenceBatch:
    """R sequences [prompt, response, padding], all from column 0 on, or packed into one row.

    A causal model needs no mask for padding: no token sees what comes after it. Tensors of
    responses, (R, T), have every response from column 0 on, too. Masks come from lengths, so ids
    may equal `pad_id` anywhere.
    """

    input_ids: Tensor
    """(R, S) int64; (1, N) where packed."""
    responses: Tensor
    """(R, T) int64, the responses alone, terminators included."""
    response_mask: Tensor
    """(R, T) bool, True on the response."""
    response_positions: Tensor
    """(N,) int64, where the N response tokens, row by row, are in the flattened `input_ids`."""
    preceding_positions: Tensor
    """(N,) int64, where the token before each response token is in the flattened `input_ids`."""
    packing: Packing | None = None
    """Where the sequences are in a packed row; None: one in each row."""

    def window(self, values: Tensor) -> Tensor:
        """Values of the N response tokens as an (R, T) tensor, 0 where masked."""
        empty = values.new_zeros(self.response_mask.shape)
        return empty.masked_scatter(self.response_mask, values)

    def rows(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """The token ids of each prompt and each response, without padding."""
        ids, lengths = self.input_ids.cpu().numpy(), self.response_mask.sum(1).cpu().numpy()
        firsts = self.response_positions.cpu().numpy()[lengths.cumsum() - lengths]
        starts = firsts - np.arange(len(ids)) * ids.shape[1]
        return [
            (row[:start], row[start : start + length])
            for row, start, length in zip(ids, starts, lengths, strict=True)
        ]


def global_batches(count: int, batch_size: int, *, steps: int, seed: int) -> list[np.ndarray]:
    """Row numbers of each of so many full batches; every epoch is a new permutation of all rows.

    What is left at the end of an epoch goes into the first batch of the next, so that every step is
    full. How many steps there are is counted by `planning.workload.count_steps`.
    """
    order = np.concatenate(
        [
            np.random.default_rng([seed, epoch]).permutation(count)
            for epoch in range(-(-steps * batch_size // count))
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

    lengths: (N,) of the rows in `indices` (N,), in the same order. With several processes, every
    one of them gets a part of each round (`distributed.shard_micro_batches`), and a round takes as
    long as its longest part.
    """
    ordered_lengths, ordered = _longest_first(lengths, indices)
    ranks = world_size()
    rounds = _cheapest_cut(ordered_lengths[::ranks], size)
    return _dealt(ordered, [slice(r.start * ranks, r.stop * ranks) for r in rounds])


def pair_batches(
    lengths: Sequence[int] | np.ndarray, indices: np.ndarray, size: int
) -> list[np.ndarray]:
    """Cut a batch of pairs into as few parts of at most `size` pairs as there can be.

    Arguments as in `micro_batches`. Padding is left to `forward_passes`, which cuts within a part.
    """
    ordered = _longest_first(lengths, indices)[1]
    turn = size * world_size()
    return _dealt(ordered, [slice(at, at + turn) for at in range(0, len(ordered), turn)])


def forward_passes(lengths: np.ndarray, *beside: np.ndarray) -> list[np.ndarray]:
    """Cut sequences into the passes that take least time, the longest first: their row numbers.

    lengths: (R,). beside: those that other processes have in this turn. All make equally many
    passes, for each is a collective call where weights are sharded: a single one where they have
    not equally many sequences.
    """
    order = np.argsort(-lengths, kind="stable")
    if any(len(theirs) != len(lengths) for theirs in beside):
        return [order]
    slowest = np.max([-np.sort(-theirs) for theirs in (lengths, *beside)], axis=0)
    return [order[part] for part in _cheapest_cut(slowest, len(order))]


def _cheapest_cut(lengths: np.ndarray, size: int) -> list[slice]:
    """Cut rows into passes of at most `size`, each padded to its longest row, at the least cost.

    lengths: (N,), the longest first. Each further pass has a cost of its own (`PASS_TOKENS`).
    """
    count = len(lengths)
    pass_cost = PASS_TOKENS[_device_type()]
    cheapest = np.zeros(count + 1)  # of the rows from each place on
    rows = np.ones(count, int)  # of the pass that begins there
    for place in range(count - 1, -1, -1):
        most = min(size, count - place)
        costs = lengths[place] * np.arange(1, most + 1) + cheapest[place + 1 : place + most + 1]
        rows[place] = costs.argmin() + 1
        cheapest[place] = costs.min() + pass_cost
    cuts, place = [], 0
    while place < count:
        cuts.append(slice(place, place + rows[place]))
        place += rows[place]
    return cuts


def _dealt(ordered: np.ndarray, rounds: Sequence[slice]) -> list[np.ndarray]:
    """Deal the rows of each turn to the processes one by one, so that all get alike ones."""
    parts: list[np.ndarray] = []
    for turn in rounds:
        rows = ordered[turn]
        ranks = min(world_size(), len(rows))
        parts += [rows[rank::ranks] for rank in range(ranks)]
    return parts


def _longest_first(
    lengths: Sequence[int] | np.ndarray, indices: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    order = np.argsort(-np.asarray(lengths), kind="stable")
    return np.asarray(lengths)[order], np.asarray(indices)[order]


def _device_type() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def padded_width(tokens: int, device: torch.device | str | None) -> int:
    """The width that sequences of at most so many tokens are padded to on a device."""
    step = WIDTH_STEP.get(str(device or "cpu").partition(":")[0], 1)
    return -(-tokens // step) * step


def collate_sequences(
    prompts: Sequence[Ids],
    responses: Sequence[Ids],
    pad_id: int,
    device: torch.device | str | None = None,
) -> SequenceBatch:
    """Tensors of R prompts and their responses."""
    import torch

    starts, lengths = (np.array([*map(len, ids)]) for ids in (prompts, responses))
    width = padded_width(int((starts + lengths).max()), device)
    input_ids = np.full((len(prompts), width), pad_id, np.int64)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        input_ids[row, : starts[row]] = prompt
        input_ids[row, starts[row] : starts[row] + lengths[row]] = response
    windows, mask = response_windows(responses, pad_id)
    row_starts = np.arange(len(prompts)) * input_ids.shape[1] + starts
    response_positions = (row_starts[:, None] + np.arange(windows.shape[1]))[mask]
    positions = torch.from_numpy(response_positions).to(device)
    return SequenceBatch(
        input_ids=torch.from_numpy(input_ids).to(device),
        responses=torch.from_numpy(windows).to(device),
        response_mask=torch.from_numpy(mask).to(device),
        response_positions=positions,
        preceding_positions=positions - 1,
    )


def response_windows(responses: Sequence[Ids], pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """R responses from column 0 on and their mask: (R, T) int64 and bool."""
    lengths = np.array([*map(len, responses)])
    mask = np.arange(lengths.max()) < lengths[:, None]
    windows = np.full(mask.shape, pad_id, np.int64)
    windows[mask] = np.concatenate(responses)
    return windows, mask


def padded(rows: Sequence[Ids], device: torch.device | str | None = None) -> Tensor:
    """Rows of ids as one tensor, filled up with 0: (R, T) int64."""
    import torch

    ids = np.zeros((len(rows), max(map(len, rows))), np.int64)
    for row, one in enumerate(rows):
        ids[row, : len(one)] = one
    return torch.from_numpy(ids).to(device)


def collate_sides(
    rows: Sequence[EncodedPairRow],
    numbers: Iterable[int],
    pad_id: int,
    device: torch.device | str | None = None,
) -> SequenceBatch:
    """Tensors of some of the sequences of N pairs.

    numbers: of the sequences, as in `sequences.Sequences`: n is the chosen side of pair n, N + n
    its rejected side, and from 2N on come the other answers of rankings.
    """
    return collate_sequences(*sides_of(rows, numbers), pad_id, device)


def sides_of(
    rows: Sequence[EncodedPairRow], numbers: Iterable[int]
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Prompts and responses of some sequences of pairs. numbers: as in `collate_sides`."""
    count, numbers = len(rows), [int(n) for n in numbers]
    ranked = any(n >= 2 * count for n in numbers)
    others = [(row, answer) for row in rows for answer in row.others] if ranked else []

    def side(number: int) -> tuple[EncodedPairRow, np.ndarray]:
        if number >= 2 * count:
            return others[number - 2 * count]
        row = rows[number % count]
        return row, row.chosen if number < count else row.rejected

    sides = [side(n) for n in numbers]
    return [row.prompt for row, _ in sides], [response for _, response in sides]


def margins(rows: Sequence[EncodedPairRow], device: torch.device) -> Tensor | None:
    """(B,) float32, NaN for a pair without margin; None where no pair has one."""
    import torch

    if all(row.margin is None for row in rows):
        return None
    found = [math.nan if row.margin is None else row.margin for row in rows]
    return torch.tensor(found, device=device)
