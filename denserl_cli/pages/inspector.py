"""The inspector's page: entropy and value of each token, cut into segments in the page itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from denserl_cli.core.inspection.compare import View
from denserl_cli.core.inspection.statistics import CutStatistics
from denserl_cli.core.inspection.traces import Cut, Trace, in_pairs
from denserl_cli.pages import render

GRID = 10_000
"""Entropies are rounded to 1/GRID nat; cutoffs on the page are multiples of it, or a recipe's."""
COLUMNS = {
    "cutoff": "cutoff",
    "segments": "segments",
    "count_mean": "per response",
    "count_median": "median",
    "length_mean": "tokens",
    "length_p10": "10 %",
    "length_median": "median",
    "length_p90": "90 %",
    "length_max": "longest",
    "single_tokens": "of one token",
}
"""Metrics of a cutoff, and the titles of their columns in a table."""


def inspector_page(
    title: str,
    about: Sequence[str],
    views: Sequence[View],
    statistics: Sequence[CutStatistics] = (),
) -> str:
    """One HTML page with every response of the views.

    Args:
        title: Of the page.
        about: Lines below the title.
        views: One, or two of the same responses to compare.
        statistics: Of the segments at several cutoffs; none: the page has no statistics.
    """
    own = sorted({v.cut.cutoff for v in views if v.cut.cutoff is not None}, reverse=True)
    distinct = list({id(view.traces): view.traces for view in views}.values())
    first = views[0]
    given = any(view.cut.cutoff is None for view in views)
    shown = [
        {
            **described_view(view.name, view.cut),
            "traces": next(n for n, t in enumerate(distinct) if t is view.traces),
        }
        for view in views
    ]
    data = {
        "views": shown,
        "traces": [[_columns(trace, own, given) for trace in traces] for traces in distinct],
        "examples": _examples(first.traces),
        "statistics": [_series(one, own) for one in statistics] or None,
    }
    return render(
        "inspector.html.j2",
        title=title,
        about=about,
        views=shown,
        rewarded=any(trace.values is not None for trace in first.traces),
        normalized=first.cut.normalizer is not None,
        ready=first.cut.pays,
        entropies=all(trace.entropy is not None for trace in first.traces),
        statistics=_table(statistics) if statistics else None,
        data=data,
    )


def described_view(name: str, cut: Cut) -> dict[str, Any]:
    """A view without its traces."""
    return {
        "name": name,
        "cutoff": cut.cutoff,
        "at_peaks": cut.at_peaks,
        "normalizer": asdict(cut.normalizer) if cut.normalizer else None,
        "ready": cut.pays,
        "aggregate": cut.aggregate,
        "spread": {
            "interpolation": cut.rewards.interpolation,
            "segment_total": cut.rewards.segment_total,
            "softmin_temperature": cut.rewards.softmin_temperature,
            "weight": cut.weight or 0.0,
            "length_normalize": cut.rewards.length_normalize,
            "clip": cut.rewards.clip,
        },
    }


def _examples(traces: Sequence[Trace]) -> list[dict[str, Any]]:
    """Pairs, or single responses, as numbers of traces."""
    examples, number = [], 0
    for group in in_pairs(traces):
        label = group[0].label
        if len(group) > 1:
            label = label.removesuffix(f" {group[0].side}")
        numbers = list(range(number, number + len(group)))
        examples.append({"label": label, "prompt": group[0].prompt, "responses": numbers})
        number += len(group)
    return examples


def _columns(trace: Trace, own: Sequence[float], given: bool) -> dict[str, Any]:
    """A response in few characters: its whole text, and the size of each token's part of it.

    Sizes are in UTF-16 units, in which JavaScript counts.

    Args:
        trace: The response.
        own: The views' cutoffs in descending order, as in `rounded`.
        given: Whether a view without a cutoff needs the ends of the segments.
    """
    return {
        "side": trace.side,
        "terminated": trace.terminated,
        "text": trace.text,
        "sizes": [len(text.encode("utf-16-le")) // 2 for text in trace.texts],
        "ends": np.nonzero(trace.ends)[0].tolist() if given else None,
        "entropy": None if trace.entropy is None else rounded(trace.entropy, own).tolist(),
        "values": None if trace.values is None else [round(v, 4) for v in trace.values.tolist()],
    }


def rounded(entropy: NDArray[np.float32], own: Sequence[float] = ()) -> NDArray[np.float64]:
    """Entropies in fewer digits that give the same segments at every cutoff of the page.

    Rounds up to the next multiple of 1/GRID, so that a multiple is below the rounded value if and
    only if it is below the exact one (compared in float32, as in `segment_ends`).

    Args:
        entropy: (T,), nats.
        own: Further cutoffs, in descending order, for which the same must hold.

    Returns:
        (T,), nats.
    """
    steps = np.ceil(entropy.astype(np.float64) * GRID)
    steps -= ((steps - 1) / GRID).astype(np.float32) >= entropy
    found = steps / GRID
    for cutoff in own:
        found = np.where((found > cutoff) & (entropy <= np.float32(cutoff)), cutoff, found)
    return found


def _series(one: CutStatistics, own: Sequence[float]) -> dict[str, Any]:
    document = one.document()
    return {
        "name": f"{one.cutoff:.4g}",
        "own": one.cutoff in own,
        "lengths": document["lengths"],
        "counts": document["counts"],
    }


def _table(statistics: Sequence[CutStatistics]) -> dict[str, Any]:
    """The metrics of each cutoff as cells."""
    rows = []
    for one in statistics:
        metrics = one.metrics()
        rows.append([f"{metrics[name]:.4g}" for name in COLUMNS])
    responses = len(statistics[0].counts)
    return {"columns": list(COLUMNS.values()), "rows": rows, "responses": responses}
