"""The sequences of pairs and rankings, by number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations

import numpy as np

from denserl_cli.core.data.batches import EncodedPairRow


@dataclass(frozen=True, eq=False)
class Sequences:
    """All sequences of N pairs and rankings.

    The chosen one of row n is n, its rejected one N + n; from 2N on come the others of rankings,
    row by row, the better first.
    """

    others: np.ndarray
    """(N,), how many further answers each row has; 0 for a pair."""
    lengths: np.ndarray
    """(M,), tokens of each sequence, prompt and response."""
    responses: np.ndarray
    """(M,), tokens of each response."""

    @property
    def ranked(self) -> bool:
        """Whether a row has more than two answers."""
        return len(self.lengths) > 2 * len(self.others)

    @cached_property
    def owners(self) -> np.ndarray:
        """(M,), the row of each sequence."""
        rows = np.arange(len(self.others))
        return np.concatenate([rows, rows, np.repeat(rows, self.others)])

    @cached_property
    def tokens(self) -> np.ndarray:
        """(N,), those of all sequences of a row."""
        found = np.zeros(len(self.others), np.int64)
        np.add.at(found, self.owners, self.lengths)
        return found

    @cached_property
    def _starts(self) -> np.ndarray:
        """(N,), the number of the first of the others of each row."""
        return 2 * len(self.others) + self.others.cumsum() - self.others

    def of(self, rows: np.ndarray) -> np.ndarray:
        """The numbers of the sequences of some rows, in the order that those alone have them in."""
        others = ranges(self._starts[rows], self.others[rows])
        return np.concatenate([rows, rows + len(self.others), others])

    def pairs(self) -> np.ndarray:
        """(P, 2), the numbers of the better and the worse sequence of every two in a row."""
        table = ranking_table(self.others)
        better, worse = np.triu_indices(table.shape[1], 1)
        found = np.stack([table[:, better], table[:, worse]], -1)
        return found[(found >= 0).all(-1)]

    def part(
        self, rows: Sequence[EncodedPairRow], numbers: np.ndarray
    ) -> tuple[Sequence[EncodedPairRow], np.ndarray]:
        """The rows of some sequences, and what the numbers of these are among those rows."""
        if not self.ranked:
            return rows, numbers
        owners = np.unique(self.owners[numbers])
        known = self.of(owners)
        order = np.argsort(known)
        local = order[np.searchsorted(known, numbers, sorter=order)]
        return [rows[int(owner)] for owner in owners], local


def ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """So many numbers from each start on, one range after the other. starts, counts: (N,)."""
    shift = np.repeat(starts - (counts.cumsum() - counts), counts)
    return shift + np.arange(len(shift))


def ranking_table(others: np.ndarray) -> np.ndarray:
    """The sequences of each row, the best first, -1 after the last: (N, K). others: (N,)."""
    count = len(others)
    rows, starts = np.arange(count)[:, None], 2 * count + others.cumsum() - others
    columns, last = np.arange(others.max(initial=0) + 2), others[:, None] + 1
    table = np.where(columns == 0, rows, starts[:, None] + columns - 1)
    return np.where(columns < last, table, np.where(columns == last, count + rows, -1))


def every_pair(rows: Sequence[EncodedPairRow]) -> list[EncodedPairRow]:
    """Rankings as pairs of every two of their answers, in the order of `Sequences.pairs`."""
    return [
        replace(row, chosen=better, rejected=worse, others=())
        for row in rows
        for better, worse in combinations((row.chosen, *row.others, row.rejected), 2)
    ]
