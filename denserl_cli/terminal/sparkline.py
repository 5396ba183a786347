"""The course of a metric in one line of block characters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

_POINTS = 512
_BLOCKS = "▁▂▃▄▅▆▇█"
_NOT_FINITE = "×"


class Curve:
    """The course of one metric: at most `_POINTS` points, each the mean of equally many steps.

    latest: the newest value. It may be NaN or infinite; means are over the finite values.
    """

    def __init__(self) -> None:
        self.latest = math.nan
        self._points: list[float] = []
        self._steps_each = 1
        self._open: list[float] = []

    def add(self, value: float) -> None:
        """Put the value of the next step at the end."""
        self.latest = value
        self._open.append(value)
        if len(self._open) == self._steps_each:
            self._points.append(_mean(self._open))
            self._open = []
        if len(self._points) == _POINTS:
            self._points = binned(self._points, _POINTS // 2)
            self._steps_each *= 2

    @property
    def points(self) -> list[float]:
        """The course from the first step to the last."""
        return [*self._points, _mean(self._open)] if self._open else list(self._points)


def binned(values: Sequence[float], count: int) -> list[float]:
    """At most `count` means of neighbouring values."""
    if len(values) <= count:
        return list(values)
    edges = [k * len(values) // count for k in range(count + 1)]
    return [_mean(values[a:b]) for a, b in pairwise(edges)]


def sparkline(values: Sequence[float]) -> str:
    """One character a value, from the smallest (▁) to the largest (█); × where it is not finite."""
    finite = [value for value in values if math.isfinite(value)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    steps = (len(_BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(
        _BLOCKS[round((value - low) * steps)] if math.isfinite(value) else _NOT_FINITE
        for value in values
    )


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan
