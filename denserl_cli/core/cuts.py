"""What cutoffs do to a data set, and how far two cuts of the same responses agree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from denserl_cli.core.errors import DenserlError
from denserl_cli.core.segmentation import calibrate_cutoff
from denserl_cli.core.traces import Cut, SegmentedResponse, Trace

LENGTHS = (2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0)
"""Mean lengths of segments, in tokens, whose cutoffs are shown where nobody names cutoffs."""


class CutStatistics(NamedTuple):
    """Segments of a data set at one cutoff (None: the recipe needs none).

    lengths: (segments,), tokens of each. counts: (responses,), segments of each.
    """

    cutoff: float | None
    lengths: NDArray[np.int64]
    counts: NDArray[np.int64]

    @classmethod
    def of(cls, cut: Cut, traces: Sequence[Trace]) -> CutStatistics:
        """Cut responses and measure the segments."""
        ends = [torch.nonzero(cut.ends(trace)[0])[:, 0].numpy() for trace in traces]
        lengths = np.concatenate([np.diff(each, prepend=-1) for each in ends])
        counts = np.array([len(each) for each in ends])
        return cls(cut.segmentation.cutoff, lengths, counts)

    def figures(self) -> dict[str, float | None]:
        """The distribution in a few numbers; lengths in tokens, counts in segments a response."""
        shown = {"mean": np.mean, "p10": _tenth, "median": np.median, "p90": _ninetieth}
        return {
            "cutoff": self.cutoff,
            "segments": len(self.lengths),
            **{f"length_{name}": float(take(self.lengths)) for name, take in shown.items()},
            "length_max": int(self.lengths.max()),
            "single_tokens": float((self.lengths == 1).mean()),
            **{f"count_{name}": float(take(self.counts)) for name, take in shown.items()},
        }

    def document(self) -> dict[str, Any]:
        """The figures with both distributions, as value: how often."""
        return {
            **self.figures(),
            "lengths": _histogram(self.lengths),
            "counts": _histogram(self.counts),
        }


def statistics(
    cut: Cut, traces: Sequence[Trace], cutoffs: Sequence[float] = ()
) -> list[CutStatistics]:
    """Segments of a data set at several cutoffs, in ascending order.

    cutoffs: nats; without any, those that give segments of `LENGTHS` tokens on average. The cut's
    own is always among them. Raises DenserlError where no entropies were computed.
    """
    check_entropies(traces)
    own = cut.segmentation
    found = set(cutoffs or _calibrated(traces))
    if own.granularity == "segment":
        assert isinstance(own.cutoff, float)
        found.add(own.cutoff)
    return [CutStatistics.of(at(cut, cutoff), traces) for cutoff in sorted(found)]


def check_entropies(traces: Sequence[Trace]) -> None:
    """Raise DenserlError where no entropies were computed."""
    if any(trace.entropy is None for trace in traces):
        raise DenserlError(
            "there are no entropies to cut at: the recipe's reward model reads whole responses",
            hint="use a recipe of granularity segment",
        )


def at(cut: Cut, cutoff: float) -> Cut:
    """The same with segments cut at another entropy."""
    segmentation = replace(cut.segmentation, granularity="segment", cutoff=cutoff)
    return cut._replace(segmentation=segmentation)


class View(NamedTuple):
    """Responses as one model and one cut see them, and what to call that."""

    name: str
    cut: Cut
    traces: list[Trace]


class Agreement(NamedTuple):
    """How far two cuts of the same responses agree, over `responses` of them.

    segments: of each cut. boundaries: ends of segments inside the responses, of each cut; the end
    of a response is no boundary. shared: those that both have, at the same place in the text.
    """

    responses: int
    segments: tuple[int, int]
    boundaries: tuple[int, int]
    shared: int

    @property
    def f1(self) -> float:
        """2 shared / (boundaries of both): 1 where all are shared, and where there are none."""
        total = sum(self.boundaries)
        return 2 * self.shared / total if total else 1.0

    def document(self) -> dict[str, Any]:
        """For programs."""
        return {**self._asdict(), "f1": self.f1}


def agreement(first: Sequence[SegmentedResponse], second: Sequence[SegmentedResponse]) -> Agreement:
    """Compare two cuts of the same responses, made by the same tokenizer or by two."""
    places = [_boundaries(a, b) for a, b in zip(first, second, strict=True)]
    return Agreement(
        len(places),
        (sum(len(a.segments) for a in first), sum(len(b.segments) for b in second)),
        (sum(len(a) for a, _ in places), sum(len(b) for _, b in places)),
        sum(len(a & b) for a, b in places),
    )


def _boundaries(*cuts: SegmentedResponse) -> list[set[int]]:
    """Where segments end inside a response, for each of its cuts: characters before.

    Spaces do not count: two tokenizers may write them differently, and put the space before a word
    into the word or before it. Where one read less than the other, the text that both read counts.
    """
    ends = [
        np.cumsum([len("".join(s.text.split())) for s in one.segments]).tolist() for one in cuts
    ]
    last = min(places[-1] for places in ends)
    return [{place for place in places if 0 < place < last} for places in ends]


def _calibrated(traces: Sequence[Trace]) -> set[float]:
    """The cutoffs of `LENGTHS`, rounded to what people type."""
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


def _tenth(values: NDArray[np.int64]) -> float:
    return float(np.quantile(values, 0.1))


def _ninetieth(values: NDArray[np.int64]) -> float:
    return float(np.quantile(values, 0.9))
