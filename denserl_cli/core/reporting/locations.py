"""Segment rewards by location, pooled over iterations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from denserl_cli.core.reporting.record import Line


class Pooled(NamedTuple):
    """Statistics of segments by location, (bins,) each.

    segments: their number. mean, std: of their rewards, the population's; NaN in an empty bin.
    """

    segments: NDArray[np.float64]
    mean: NDArray[np.float64]
    std: NDArray[np.float64]

    @property
    def middles(self) -> NDArray[np.float64]:
        """The middle of each bin of the location p in (0, 1]."""
        return (np.arange(len(self.segments)) + 0.5) / len(self.segments)

    @property
    def whole(self) -> tuple[float, float]:
        """Mean and std over all segments."""
        mean, square = np.nan_to_num(self.mean), np.nan_to_num(self.std) ** 2
        shares = self.segments / self.segments.sum()
        centre = float(shares @ mean)
        return centre, float(np.sqrt(shares @ (square + mean**2) - centre**2))


def pool(lines: Sequence[Line], kind: str) -> Pooled | None:
    """Pool the segments of several iterations.

    Args:
        lines: Of train-ppo.
        kind: `value`, before normalisation, or `reward`, after it.

    Returns:
        The statistics; None where the lines have none.
    """
    found = [table for line in lines if (table := _table(line, kind)) is not None]
    if not found:
        return None
    widths = [table.shape[1] for table in found]
    count, mean, std = np.stack([t for t in found if t.shape[1] == widths[-1]]).transpose(1, 0, 2)
    segments = count.sum(0)
    if not segments.any():
        return None
    with np.errstate(invalid="ignore"):
        centre = (count * mean).sum(0) / segments
        square = (count * (std**2 + mean**2)).sum(0) / segments
    return Pooled(segments, centre, np.sqrt(np.maximum(square - centre**2, 0)))


def _table(line: Line, kind: str) -> NDArray[np.float64] | None:
    """Count, mean and std of a line by location: (3, bins), 0 in an empty bin; None if absent."""
    names = ("location_segments", f"location_{kind}_mean", f"location_{kind}_std")
    columns: list[Any] = [line.get(name) for name in names]
    if not all(isinstance(column, list) for column in columns):
        return None
    try:
        table = np.array(columns, dtype=np.float64)
    except (ValueError, TypeError, OverflowError):  # different lengths, or not numbers
        return None
    good = table.ndim == 2 and np.isfinite(table[:, table[0] > 0]).all()
    return np.nan_to_num(table) if good else None
