"""Sequences one after another in a single row: no padding, and every prompt only once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from denserl_cli.core.data.batches import (
    EncodedPairRow,
    Packing,
    SequenceBatch,
    collate_sequences,
    micro_batches,
    pair_batches,
    response_windows,
    sides_of,
)

if TYPE_CHECKING:
    import torch

    from denserl_cli.core.data.sequences import Sequences
    from denserl_cli.core.data.steps import EncodedStepRow

    Ids = np.ndarray | Sequence[int]


def pack_sequences(
    prompts: Sequence[Ids],
    responses: Sequence[Ids],
    pad_id: int,
    device: torch.device | str | None = None,
) -> SequenceBatch:
    """Tensors of R prompts and their responses in one row, grouped by prompt.

    Args:
        prompts: R of them; of equal ones the first is kept.
        responses: One for each prompt.
        pad_id: Fills up the responses alone, for `input_ids` has no padding.
        device: Of the tensors.
    """
    import torch

    holders = _holders(prompts)
    order = np.argsort(holders, kind="stable")  # each prompt's responses follow it
    holds = holders == np.arange(len(prompts))
    starts, lengths = (np.array([*map(len, ids)]) for ids in (prompts, responses))
    whole = starts + lengths
    own = np.where(holds, whole, lengths)
    ends = np.empty_like(own)  # of each sequence in the row
    ends[order] = own[order].cumsum()
    answers = ends - lengths  # where the responses begin
    prompt_ends = answers[holders]

    ids = [part for n in order for part in ([prompts[n]] if holds[n] else []) + [responses[n]]]
    at = [np.arange(whole[n] - own[n], whole[n]) for n in order]
    seen = [np.r_[prompt_ends[n] - starts[n] : prompt_ends[n], answers[n] : ends[n]] for n in order]
    windows, mask = response_windows(responses, pad_id)
    columns = np.arange(windows.shape[1])
    positions = answers[:, None] + columns
    preceding = np.where(columns == 0, prompt_ends[:, None], positions) - 1
    cumulative = np.stack([np.cumsum(np.r_[0, one[order]]) for one in (own, whole)])

    def tensor(array: np.ndarray, kind: type = np.int64) -> torch.Tensor:
        return torch.from_numpy(array.astype(kind)).to(device)

    return SequenceBatch(
        tensor(np.concatenate(ids)[None]),
        tensor(windows),
        tensor(mask, bool),
        tensor(positions[mask]),
        tensor(preceding[mask]),
        Packing(
            own=own[order].tolist(),
            whole=whole[order].tolist(),
            holders=np.argsort(order)[holders[order]].tolist(),
            position_ids=tensor(np.concatenate(at)[None]),
            tokens=None if holds.all() else tensor(np.concatenate(seen)),
            cumulative=tensor(cumulative, np.int32),
        ),
    )


def _holders(prompts: Sequence[Ids]) -> np.ndarray:
    """The number of the first prompt that is equal to each: (R,)."""
    first: dict[bytes, int] = {}
    keys = (np.asarray(prompt, np.int32).tobytes() for prompt in prompts)
    return np.array([first.setdefault(key, number) for number, key in enumerate(keys)])


def pack_sides(
    rows: Sequence[EncodedPairRow],
    numbers: Iterable[int],
    pad_id: int,
    device: torch.device | str | None = None,
) -> SequenceBatch:
    """Some of the sequences of N pairs in one row. numbers: as in `collate_sides`."""
    return pack_sequences(*sides_of(rows, numbers), pad_id, device)


def collate_steps(
    rows: Sequence[EncodedStepRow],
    pad_id: int,
    device: torch.device | str | None = None,
    *,
    packed: bool,
) -> SequenceBatch:
    """Some responses in steps, packed or padded."""
    together = pack_sequences if packed else collate_sequences
    return together([row.prompt for row in rows], [row.response for row in rows], pad_id, device)


def side_batches(sequences: Sequences, size: int, *, packed: bool) -> list[np.ndarray]:
    """Cut the sequences of pairs into passes, those of a pair together where it spares time.

    Args:
        sequences: All of them.
        size: Pairs in a pass, at most; a ranking that is packed counts as one.
        packed: Whether a pass is packed: then the prompt of a pair is read once.

    Returns:
        The numbers of the sequences of each pass.
    """
    if not packed:
        return micro_batches(sequences.lengths, np.arange(len(sequences.lengths)), 2 * size)
    pairs = pair_batches(sequences.tokens, np.arange(len(sequences.tokens)), size)
    return [sequences.of(part) for part in pairs]
