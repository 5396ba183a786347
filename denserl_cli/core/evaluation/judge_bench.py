"""JudgeBench: two answers of one model to hard questions, one of them wrong.

Tan et al. 2024, *JudgeBench: A Benchmark for Evaluating LLM-based Judges*.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from denserl_cli.core.data.row_formats import UnusableRow
from denserl_cli.core.evaluation.benchmark_rows import (
    BenchmarkFormat,
    BenchmarkRow,
    Fields,
    RankedBenchmark,
    ScoredRow,
    one_of,
    text,
)
from denserl_cli.core.reward_model.metrics import accuracy

CATEGORIES = {
    "mmlu-pro": "Knowledge",
    "livebench-reasoning": "Reasoning",
    "livebench-math": "Math",
    "livecodebench": "Coding",
}
"""How the sources of each category begin."""


def _parse(fields: Fields, origin: str) -> BenchmarkRow:
    label = one_of(fields, "label", ("A>B", "B>A"))
    source = text(fields, "source")
    if not source.startswith(tuple(CATEGORIES)):
        raise UnusableRow(f"source is {source[:60]!r}, which begins with none of {_known()}")
    sides = [text(fields, f"response_{side}") for side in label.split(">")]
    writer = str(fields.get("response_model"))
    return BenchmarkRow(text(fields, "question"), (sides[0],), (sides[1],), source, writer, origin)


def metrics(rows: Sequence[ScoredRow]) -> dict[str, Any]:
    """Accuracy by category; the official score is that over all pairs.

    A tie is an error, as it is for the benchmark's own code when it asks in both orders.
    """
    margins = np.array([row.correct[0] - row.wrong[0] for row in rows])
    categories = np.array([_category(row.part) for row in rows])
    parts = [
        {"category": name, **asdict(accuracy(margins[categories == name]))}
        for name in CATEGORIES.values()
        if name in categories
    ]
    absent = [name for name in CATEGORIES.values() if name not in categories]
    writers = sorted({row.id for row in rows})
    incomplete = [f"no pairs of {', '.join(absent)}"] if absent else []
    if len(writers) > 1:
        incomplete.append(
            f"answers of several models, {', '.join(writers)}: each is a set of its own"
        )
    return {
        "score": None if absent else float((margins > 0).mean()),
        "macro_average": None if absent else float(np.mean([p["accuracy"] for p in parts])),
        "parts": parts,
        "incomplete": incomplete,
    }


def _category(source: str) -> str:
    return next(name for start, name in CATEGORIES.items() if source.startswith(start))


def _known() -> str:
    return ", ".join(CATEGORIES)


FORMAT = BenchmarkFormat(
    name="judgebench",
    columns=("source", "question", "response_A", "response_B", "label"),
    parse=_parse,
)
BENCHMARK = RankedBenchmark(FORMAT, metrics)
