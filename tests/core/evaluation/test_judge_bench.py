"""JudgeBench's metrics, worked out by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from denserl_cli.core.data.row_formats import UnusableRow
from denserl_cli.core.evaluation import judge_bench
from denserl_cli.core.evaluation.benchmark_rows import ScoredRow
from denserl_cli.core.evaluation.judge_bench import metrics

SOURCES = ("mmlu-pro-law", "livebench-reasoning", "livebench-math", "livecodebench")


def row(source: str, margin: float, writer: str = "gpt") -> ScoredRow:
    return ScoredRow(source, writer, np.array([margin]), np.array([0.0]))


def test_the_score_is_that_of_all_pairs_and_the_macro_average_that_of_the_categories():
    rows = [row("mmlu-pro-law", 1.0), row("mmlu-pro-physics", 1.0), row("mmlu-pro-math", -1.0)]
    rows += [row("livebench-reasoning", 2.0), row("livebench-math", -1.0)]
    rows += [row("livecodebench", 0.0)]  # a tie is an error
    found = metrics(rows)
    assert found["score"] == pytest.approx(3 / 6)
    accuracies = {part["category"]: part["accuracy"] for part in found["parts"]}
    assert accuracies == {"Knowledge": pytest.approx(2 / 3), "Reasoning": 1, "Math": 0, "Coding": 0}
    assert found["macro_average"] == pytest.approx((2 / 3 + 1) / 4)
    assert [part["ties"] for part in found["parts"]] == [0, 0, 0, 1]
    assert found["incomplete"] == []


def test_without_a_category_there_is_no_official_score():
    found = metrics([row(source, 1.0) for source in SOURCES[:3]])
    assert found["score"] is None and found["macro_average"] is None
    assert found["incomplete"] == ["no pairs of Coding"]


def test_the_sets_of_two_models_are_not_one():
    rows = [row(source, 1.0, writer) for source in SOURCES for writer in ("gpt", "claude")]
    (reason,) = metrics(rows)["incomplete"]
    assert reason.startswith("answers of several models, claude, gpt")


GOOD = {
    "pair_id": "1", "source": "mmlu-pro-law", "question": "q", "response_model": "gpt",
    "response_A": "a", "response_B": "b", "label": "B>A",
}  # fmt: skip


@pytest.mark.parametrize(("label", "order"), [("A>B", ("a", "b")), ("B>A", ("b", "a"))])
def test_the_label_says_which_answer_is_correct(label: str, order: tuple[str, str]):
    assert judge_bench.FORMAT.parse({**GOOD, "label": label}, "here").answers == order


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"label": "A=B"}, "label is 'A=B', not one of A>B, B>A"),
        ({"source": "mmlu"}, "source is 'mmlu', which begins with none of mmlu-pro"),
        ({"response_B": None}, "response_B is empty, not text"),
    ],
)
def test_a_row_that_is_not_one(changed: dict[str, Any], message: str):
    with pytest.raises(UnusableRow) as caught:
        judge_bench.FORMAT.parse({**GOOD, **changed}, "here")
    assert caught.value.reason.startswith(message)
