"""The results of evaluations as tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from denserl_cli.core.evaluation import reward_bench

Table = tuple[str, Sequence[str], Sequence[Sequence[object]]]
"""Title, columns, rows."""
_TOTALS = ("score", "hard", "normal", "easy", "macro_average")
"""Numbers of a whole benchmark, in the order in which they are shown."""


def pair_tables(result: dict[str, Any]) -> list[Table]:
    """What people see of the evaluation of a reward model."""
    shown = [
        _overview(result),
        (
            f"calibration: expected error {result['calibration']['error']:.4f}",
            ["confidence", "pairs", "predicted", "observed"],
            [
                [f"{b['low']:.2f}–{b['high']:.2f}", b["pairs"], b["predicted"], b["observed"]]
                for b in result["calibration"]["bins"]
            ],
        ),
        (
            "by length in tokens",
            ["chosen is longer by", "pairs", "accuracy", "margin"],
            [
                [_span(b["shortest"], b["longest"]), b["pairs"], b["accuracy"], b["margin"]]
                for b in result["length"]["bins"]
            ],
        ),
    ]
    if "subsets" in result:
        columns = ["section", "subset", "pairs", "accuracy", "from", "to", "ties"]
        order = [*reward_bench.SECTIONS, reward_bench.OTHER]
        parts = sorted(result["subsets"], key=lambda part: order.index(part["section"]))
        names = ("section", "subset", "pairs", "accuracy")
        rows = [[*(p[name] for name in names), *p["interval"], p["ties"]] for p in parts]
        shown.append(("subsets", columns, rows))
    if "sections" in result:
        rows = [[name, score] for name, score in result["sections"].items()]
        rows += [["mean", result["section_mean"]]]
        if result["absent_subsets"]:
            rows += [["subsets that are absent", len(result["absent_subsets"])]]
        shown.append(("sections", ["section", "score"], rows))
    return shown + _why_unofficial(result)


def benchmark_tables(result: dict[str, Any]) -> list[Table]:
    """What people see of the evaluation of a reward model on a benchmark with its own metrics."""
    totals = [name for name in _TOTALS if name in result]
    rows: list[list[object]] = [[name.replace("_", " "), result[name]] for name in totals]
    rows += [
        ["rows", result["rows"]],
        ["answers", result["answers"]],
        ["answers that were cut", result["truncated"]],
        ["rows that are not counted", result["skipped"]],
    ]
    shown: list[Table] = [(result["benchmark"], ["metric", "value"], rows)]
    parts = [_flat(part) for part in result["parts"]]
    columns = list(dict.fromkeys(name for part in parts for name in part))
    if parts:
        cells = [[part.get(name) for name in columns] for part in parts]
        shown.append(("parts", columns, cells))
    if "ties" in result:
        ties = [[name.replace("_", " "), value] for name, value in result["ties"].items()]
        shown.append(("Ties", ["metric", "value"], ties))
    return shown + _why_unofficial(result)


def _why_unofficial(result: dict[str, Any]) -> list[Table]:
    reasons = [[reason] for reason in result.get("incomplete", ())]
    return [("not the official score", ["why"], reasons)] if reasons else []


def _flat(part: dict[str, Any]) -> dict[str, Any]:
    """A row of a table: an interval becomes two columns."""
    flat = dict(part)
    if "interval" in flat:
        flat["from"], flat["to"] = flat.pop("interval")
    return flat


def _overview(result: dict[str, Any]) -> Table:
    low, high = result["interval"]
    length = result["length"]
    rows: list[list[object]] = [
        ["pairs", result["pairs"]],
        ["accuracy", f"{result['accuracy']:.4f}  [{low:.4f}, {high:.4f}]"],
        ["ties, counted as errors", result["ties"]],
        ["mean margin", result["margin"]],
        ["accuracy of the longer one", length["longer_accuracy"]],
        ["pairs of equal length", length["equal_length"]],
        ["correlation with length", length["correlation"]],
        ["pairs that were cut", result["truncated"]],
        ["rows skipped", result["skipped"]],
    ]
    return "reward model", ["metric", "value"], rows


def _span(shortest: int | None, longest: int | None) -> str:
    if shortest is None:
        return f"{longest} or less"
    if longest is None:
        return f"{shortest} or more"
    return str(shortest) if shortest == longest else f"{shortest} to {longest}"


def policy_tables(result: dict[str, Any]) -> list[Table]:
    """What people see of the evaluation of a policy."""
    rows: list[list[object]] = []
    for name, difference in result["difference"].items():
        interval = difference["interval"]
        span = f"[{interval[0]:.4g}, {interval[1]:.4g}]" if interval else None
        means = [result[side][name] for side in ("start", "trained")]
        rows.append([name, *means, difference["mean"], span])
    best = result["best_of_n"]
    return [
        ("policy", ["metric", "start", "policy", "difference", "95 %"], rows),
        ("best of n of the start policy", list(best[0]), [list(one.values()) for one in best]),
    ]


def equivalence(result: dict[str, Any]) -> str:
    """The policy's reward in terms of best-of-n of the policy it started from."""
    best = result["best_of_n"]
    by = "rm_score" if "rm_score" in best[0] else "dense_reward"
    words = f"the policy's mean {by}"
    if result["equivalent_n"] is not None:
        return f"{words} equals that of best of {result['equivalent_n']:.2f}"
    if result["trained"][by] < best[0][by]:
        return f"{words} is below that of best of 1"
    return f"{words} is above that of best of {best[-1]['n']}"
