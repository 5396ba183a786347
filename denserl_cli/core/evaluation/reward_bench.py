"""RewardBench's sections: how the accuracies of its subsets become four numbers and their mean.

Lambert et al. 2024, *RewardBench: Evaluating Reward Models for Language Modeling*.
"""

from __future__ import annotations

from collections.abc import Mapping

from denserl_cli.core.data.row_formats import UnusableRow, pair_of
from denserl_cli.core.evaluation.benchmark_rows import (
    BenchmarkFormat,
    BenchmarkRow,
    Fields,
    text,
)

SECTIONS: dict[str, dict[str, int]] = {
    "Chat": {
        "alpacaeval-easy": 100,
        "alpacaeval-length": 95,
        "alpacaeval-hard": 95,
        "mt-bench-easy": 28,
        "mt-bench-med": 40,
    },
    "Chat Hard": {
        "mt-bench-hard": 37,
        "llmbar-natural": 100,
        "llmbar-adver-neighbor": 134,
        "llmbar-adver-GPTInst": 92,
        "llmbar-adver-GPTOut": 47,
        "llmbar-adver-manual": 46,
    },
    "Safety": {
        "refusals-dangerous": 100,
        "refusals-offensive": 100,
        "xstest-should-refuse": 154,
        "xstest-should-respond": 250,
        "donotanswer": 136,
    },
    "Reasoning": {
        "math-prm": 6 * 164,  # has 447 rows, and counts as much as all code
        **{f"hep-{language}": 164 for language in ("cpp", "go", "java", "js", "python", "rust")},
    },
}
"""Each section's subsets and their weights: the number of their rows in the benchmark."""
OTHER = "other"
ALIASES = {"mt-bench-medium": "mt-bench-med"}


def section_of(subset: str) -> str:
    """The section that a subset belongs to; `other` where it is none of the benchmark's."""
    name = ALIASES.get(subset, subset)
    return next((section for section, known in SECTIONS.items() if name in known), OTHER)


def section_scores(accuracies: Mapping[str, float]) -> dict[str, float]:
    """Weighted mean accuracy of each section, over those of its subsets that are there.

    Sections without any, and subsets of none, are left out.
    """
    named = {ALIASES.get(subset, subset): value for subset, value in accuracies.items()}
    scores = {}
    for section, weights in SECTIONS.items():
        there = {subset: weight for subset, weight in weights.items() if subset in named}
        if there:
            total = sum(named[subset] * weight for subset, weight in there.items())
            scores[section] = total / sum(there.values())
    return scores


def absent(accuracies: Mapping[str, float]) -> list[str]:
    """The benchmark's subsets that are not there."""
    named = {ALIASES.get(subset, subset) for subset in accuracies}
    return [subset for known in SECTIONS.values() for subset in known if subset not in named]


def _parse(fields: Fields, origin: str) -> BenchmarkRow:
    """A row as text; also where its sides are messages, as everywhere in preference data."""
    subset = text(fields, "subset")
    for name in ("chosen", "rejected"):
        if isinstance(fields.get(name), list) and any(isinstance(x, str) for x in fields[name]):
            raise UnusableRow(f"{name} is a list of texts, not a text")
    pair = pair_of(fields)
    prompt, chosen, rejected = (
        turn["content"] for turn in (pair.chosen[-2], pair.chosen[-1], pair.rejected[-1])
    )
    return BenchmarkRow(prompt, (chosen,), (rejected,), subset, "", origin)


FORMAT = BenchmarkFormat(
    name="reward-bench",
    columns=("chosen", "rejected", "subset"),
    parse=_parse,
)
