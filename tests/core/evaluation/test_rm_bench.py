"""RM-Bench's metrics, worked out by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from denserl_cli.core.data.row_formats import UnusableRow
from denserl_cli.core.evaluation import rm_bench
from denserl_cli.core.evaluation.benchmark_rows import ScoredRow
from denserl_cli.core.evaluation.rm_bench import metrics

NAMES = [name for names in rm_bench.DOMAINS.values() for name in names]


def row(domain: str, correct: list[float], wrong: list[float]) -> ScoredRow:
    return ScoredRow(domain, "1", np.array(correct, float), np.array(wrong, float))


def test_difficulties_by_hand():
    """Wins, correct (down) against wrong (across): 1 0 0 / 1 1 0 / 1 1 0; the tie is an error."""
    found = metrics([row("chat", [1.0, 2.0, 2.0], [0.0, 1.0, 2.0])])
    (part,) = found["parts"]
    assert part["hard"] == 0  # concise against detailed, concise and detailed against markdown
    assert part["normal"] == pytest.approx(2 / 3)
    assert part["easy"] == pytest.approx(3 / 3)
    assert part["score"] == pytest.approx((0 + 2 / 3 + 1) / 3)


def test_hard_is_a_wrong_answer_of_a_richer_style():
    found = metrics([row("code", [5.0, 0.0, 0.0], [1.0, 1.0, 1.0])])
    (part,) = found["parts"]
    assert (part["hard"], part["normal"], part["easy"]) == pytest.approx((2 / 3, 1 / 3, 0))


def test_the_score_is_the_mean_of_four_domains_with_both_halves_of_safety_alike():
    right, wrong = ([1.0] * 3, [0.0] * 3), ([0.0] * 3, [1.0] * 3)
    rows = [row(name, *right) for name in ("chat", "code")]
    rows += [row("math", *wrong), row("math", *wrong)]
    rows += [row("safety-refuse", *right), *[row("safety-response", *wrong)] * 3]
    found = metrics(rows)
    scores = {part["domain"]: part["score"] for part in found["parts"]}
    assert scores == {"chat": 1, "code": 1, "math": 0, "safety": 0.5}
    assert found["score"] == found["hard"] == found["easy"] == pytest.approx(2.5 / 4)
    assert [part["rows"] for part in found["parts"]] == [1, 1, 2, 4]
    assert found["incomplete"] == []


def test_without_a_domain_there_is_no_official_score():
    rows = [row(name, [1.0] * 3, [0.0] * 3) for name in NAMES if name != "safety-refuse"]
    found = metrics(rows)
    assert found["score"] is None and found["hard"] is None
    assert found["incomplete"] == ["no rows of safety-refuse"]
    assert [part["domain"] for part in found["parts"]] == ["chat", "code", "math"]


GOOD = {"id": "x", "prompt": "p", "chosen": list("abc"), "rejected": list("def"), "domain": "math"}


def test_a_row():
    found = rm_bench.FORMAT.parse(GOOD, "here")
    assert (found.correct, found.wrong, found.part) == (tuple("abc"), tuple("def"), "math")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"chosen": ["a", "b"]}, "chosen holds 2 texts, not 3"),
        ({"rejected": "text"}, "rejected is str, not a list of texts"),
        ({"domain": "safety"}, "domain is 'safety', not one of chat, code, math, safety-refuse"),
    ],
)
def test_a_row_that_is_not_one(changed: dict[str, Any], message: str):
    with pytest.raises(UnusableRow) as caught:
        rm_bench.FORMAT.parse({**GOOD, **changed}, "here")
    assert caught.value.reason.startswith(message)
