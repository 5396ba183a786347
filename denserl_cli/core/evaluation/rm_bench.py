"""RM-Bench: a correct and a wrong answer in three styles each.

Liu et al. 2024, *RM-Bench: Benchmarking Reward Models of Language Models with Subtlety and Style*.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from denserl_cli.core.evaluation.benchmark_rows import (
    BenchmarkFormat,
    BenchmarkRow,
    Fields,
    RankedBenchmark,
    ScoredRow,
    one_of,
    text,
    texts,
)

DOMAINS: dict[str, tuple[str, ...]] = {
    "chat": ("chat",),
    "code": ("code",),
    "math": ("math",),
    "safety": ("safety-refuse", "safety-response"),
}
"""Each domain of the official score, and what the rows call it: a domain is their mean."""
STYLES = 3
"""Concise, detailed, detailed in markdown."""
DIFFICULTIES = ("hard", "normal", "easy")


def _parse(fields: Fields, origin: str) -> BenchmarkRow:
    known = [name for names in DOMAINS.values() for name in names]
    return BenchmarkRow(
        text(fields, "prompt"),
        texts(fields, "chosen", STYLES),
        texts(fields, "rejected", STYLES),
        one_of(fields, "domain", known),
        "",
        origin,
    )


def metrics(rows: Sequence[ScoredRow]) -> dict[str, Any]:
    """Accuracy by difficulty in each domain; the official score is the mean of the domains."""
    parts = []
    for domain, names in DOMAINS.items():
        found = [[row for row in rows if row.part == name] for name in names]
        if all(found):
            levels = np.mean([_by_difficulty(part) for part in found], axis=0)
            named = dict(zip(DIFFICULTIES, levels.tolist(), strict=True))
            count = sum(map(len, found))
            parts.append({"domain": domain, "rows": count, "score": float(levels.mean()), **named})
    lacking = [
        name for names in DOMAINS.values() for name in names if all(r.part != name for r in rows)
    ]
    totals = {
        name: None if lacking else float(np.mean([part[name] for part in parts]))
        for name in ("score", *DIFFICULTIES)
    }
    incomplete = [f"no rows of {', '.join(lacking)}"] if lacking else []
    return {**totals, "parts": parts, "incomplete": incomplete}


def _by_difficulty(rows: Sequence[ScoredRow]) -> np.ndarray:
    """Accuracies hard, normal, easy: (3,). A tie is an error.

    Hard is a correct answer against a wrong one of a richer style, normal against one of the same
    style, easy against one of a plainer style.
    """
    wins = np.mean([row.correct[:, None] > row.wrong[None, :] for row in rows], axis=0)
    upper = np.triu_indices(STYLES, 1)
    return np.array([wins[upper].mean(), np.diag(wins).mean(), wins.T[upper].mean()])


FORMAT = BenchmarkFormat(
    name="rm-bench",
    columns=("prompt", "chosen", "rejected", "domain"),
    parse=_parse,
)
BENCHMARK = RankedBenchmark(FORMAT, metrics)
