"""Statistics of a data set's segments by cutoff: their lengths, and their number in a response."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from denserl_cli.core.errors import DenserlError
from denserl_cli.core.inspection.traces import Cut, Trace
from denserl_cli.core.segmentation import calibrate_cutoff

LENGTHS = (2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0)
"""Mean lengths of segments, in tokens, whose cutoffs are shown where the user names none."""


class CutStatistics(NamedTuple):
    """Segments of a data set at one cutoff.

    Attributes:
        cutoff: Nats; None where segments do not depend on one.
        lengths: (segments,), tokens of each.
        counts: (responses,), segments of each.
    """

    cutoff: float | None
    lengths: NDArray[np.int64]
    counts: NDArray[np.int64]

    @classmethod
    def of(cls, cut: Cut, traces: Sequence[Trace]) -> CutStatistics:
        """Cut responses and count the segments and their tokens."""
        ends = [torch.nonzero(cut.ends(trace)[0])[:, 0].numpy() for trace in traces]
        lengths = np.concatenate([np.diff(each, prepend=-1) for each in ends])
        counts = np.array([len(each) for each in ends])
        return cls(cut.cutoff, lengths, counts)

    def metrics(self) -> dict[str, float | None]:
        """Summary of the distributions; lengths in tokens, counts in segments a response."""
        return {
            "cutoff": self.cutoff,
            "segments": len(self.lengths),
            **_summary("count", self.counts),
            **_summary("length", self.lengths),
            "single_tokens": float((self.lengths == 1).mean()),
        }

    def document(self) -> dict[str, Any]:
        """The metrics, and both distributions as a number for each value."""
        return {
            **self.metrics(),
            "lengths": _histogram(self.lengths),
            "counts": _histogram(self.counts),
        }


def statistics(
    cut: Cut, traces: Sequence[Trace], cutoffs: Sequence[float] = ()
) -> list[CutStatistics]:
    """Segments of a data set at several cutoffs, in ascending order.

    Args:
        cut: Its cutoff is always among those that are shown.
        traces: The responses.
        cutoffs: Nats; without any, those that give segments of `LENGTHS` tokens on average.

    Raises:
        DenserlError: The traces have no entropies.
    """
    check_entropies(traces)
    found = set(cutoffs or _calibrated(traces))
    if cut.cutoff is not None:
        found.add(cut.cutoff)
    return [CutStatistics.of(at(cut, cutoff), traces) for cutoff in sorted(found)]


def check_entropies(traces: Sequence[Trace]) -> None:
    """Raise DenserlError where traces have no entropies."""
    if any(trace.entropy is None for trace in traces):
        raise DenserlError(
            "a cutoff needs entropies, and the recipe's segments do not depend on them",
            hint="use a recipe of granularity segment",
        )


def at(cut: Cut, cutoff: float) -> Cut:
    """The same cut with another cutoff, in nats."""
    return cut._replace(granularity="segment", cutoff=cutoff, rule="entropy")


def _calibrated(traces: Sequence[Trace]) -> set[float]:
    """The cutoffs for `LENGTHS`, rounded to two digits."""
    width = max(len(trace.texts) for trace in traces)
    entropy = torch.zeros(len(traces), width)
    mask = torch.zeros(len(traces), width, dtype=torch.bool)
    for row, trace in enumerate(traces):
        assert trace.entropy is not None
        entropy[row, : len(trace.texts)] = torch.from_numpy(trace.entropy)
        mask[row, : len(trace.texts)] = True
    ended = torch.tensor([trace.terminated for trace in traces])
    return {round(calibrate_cutoff(entropy, mask, length, ended), 2) for length in LENGTHS}


def _histogram(values: NDArray[np.int64]) -> dict[int, int]:
    return dict(sorted(Counter(values.tolist()).items()))


def _summary(name: str, values: NDArray[np.int64]) -> dict[str, float]:
    """Mean, quantiles and maximum."""
    tenth, median, ninetieth = np.quantile(values, (0.1, 0.5, 0.9)).tolist()
    return {
        f"{name}_mean": float(values.mean()),
        f"{name}_p10": tenth,
        f"{name}_median": median,
        f"{name}_p90": ninetieth,
        f"{name}_max": int(values.max()),
    }
