"""RewardBench 2's metrics, worked out by hand and compared with the package's own functions."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from denserl_cli.core.evaluation import reward_bench, reward_bench_2
from denserl_cli.core.evaluation.benchmark_rows import ScoredRow
from denserl_cli.core.evaluation.reward_bench_2 import SUBSETS, metrics, ties_metrics

PACKAGE = """
import json, sys
from rewardbench.constants import EXAMPLE_COUNTS, SUBSET_MAPPING
from rewardbench.utils import (
    calculate_scores_per_section, process_single_model, reroll_and_score_dataset
)
from datasets import Dataset

asked = json.load(sys.stdin)
flat = [score for row in asked["best_of"] for score in row]
unrolled = Dataset.from_dict({"text": ["x"] * len(flat), "scores": flat})
best_of = reroll_and_score_dataset(unrolled, [len(row) for row in asked["best_of"]])
answer = {
    "best_of": list(best_of["results"]),
    "ties": [float(process_single_model(rows)[1]) for rows in asked["ties"]],
    "sections": calculate_scores_per_section(EXAMPLE_COUNTS, SUBSET_MAPPING, asked["subsets"]),
}
print("\\n" + json.dumps(answer))
"""
"""What the package says, in an interpreter that has it: its requirements are older than ours."""


def ask_package(asked: dict[str, Any]) -> dict[str, Any]:
    """Run the package's functions; skips where no interpreter has it."""
    python = os.environ.get("REWARDBENCH_PYTHON", sys.executable)
    found = subprocess.run(
        [python, "-c", PACKAGE], input=json.dumps(asked), capture_output=True, text=True
    )
    (*_, error) = found.stderr.splitlines() or [""]
    if error.startswith(("ModuleNotFoundError", "ImportError")):
        pytest.skip(f"REWARDBENCH_PYTHON names no interpreter that has rewardbench: {error}")
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout.splitlines()[-1])


def row(part: str, correct: list[float], wrong: list[float], name: str = "1") -> ScoredRow:
    return ScoredRow(part, name, np.array(correct, float), np.array(wrong, float))


def tie(name: str, correct: list[float], wrong: list[float]) -> ScoredRow:
    return row("Ties", correct, wrong, name)


def test_ties_by_hand():
    rows = [
        tie("ref:0", [3.0], [1.0, 0.0]),  # gap 2
        tie("tied:0", [4.0, 3.5, 3.0], [1.0]),  # gap 2, spread 1: both above it
        tie("ref:1", [0.0], [1.0]),  # gap -1, wrong
        tie("tied:1", [5.0, 2.0], [1.0]),  # gap 1, spread 3: not above it
    ]
    found = ties_metrics(rows)
    assert found["accuracy_ref"] == 0.5 and found["accuracy_tied"] == 1.0
    assert found["gap_above_spread"] == 0.5 and found["both_gaps_above_spread"] == 0.5
    relative = (math.tanh(2 / 1 - 1) + math.tanh(-1 / 3 - 1)) / 2
    assert found["relative_gap"] == pytest.approx(relative)
    assert found["score"] == pytest.approx(0.3 + 0.15 + 0.1 + 0.1 + 0.01 * relative)
    assert found["unpaired"] == 0


def test_a_perfect_set_of_ties_can_reach_above_one():
    rows = [tie("ref:0", [900.0], [0.0]), tie("tied:0", [900.0, 901.0], [0.0])]
    assert ties_metrics(rows)["score"] == pytest.approx(1.01)


def test_equal_scores_are_wrong_and_equal_correct_ones_have_no_relative_gap():
    rows = [tie("ref:0", [1.0], [1.0]), tie("tied:0", [2.0, 2.0], [1.0])]
    found = ties_metrics(rows)
    assert (found["accuracy_ref"], found["accuracy_tied"]) == (0.0, 1.0)
    assert (found["gap_above_spread"], found["both_gaps_above_spread"]) == (1.0, 0.0)
    assert found["relative_gap"] == 0.0 and found["score"] == pytest.approx(0.5)


def test_ties_without_the_other_row_of_their_pair_are_told():
    rows = [tie("ref:0", [1.0], [0.0]), tie("tied:1", [1.0, 2.0], [0.0])]
    assert ties_metrics(rows)["unpaired"] == 2
    assert ties_metrics(rows)["score"] == pytest.approx(0.6)  # the two accuracies alone
    assert "2 rows of Ties lack the other one of their pair" in metrics(rows)["incomplete"]


def test_a_tie_of_k_for_the_highest_score_counts_one_kth():
    rows = [
        row("Math", [2.0], [1.0, 0.0, -1.0]),  # right
        row("Math", [2.0], [2.0, 2.0, 1.0]),  # 1/3
        row("Math", [2.0], [2.5, 2.0, 2.0]),  # wrong
    ]
    (part,) = metrics(rows)["parts"]
    assert part["score"] == pytest.approx((1 + 1 / 3 + 0) / 3)
    assert (part["rows"], part["ties"]) == (3, 1)
    assert part["margin"] == pytest.approx((1.0 + 0.0 - 0.5) / 3)


def test_the_score_is_the_mean_of_the_six_subsets():
    rows = [row(name, [1.0], [0.0]) for name in SUBSETS[:3]]
    rows += [row(name, [0.0], [1.0]) for name in SUBSETS[3:5]]
    rows += [tie("ref:0", [3.0], [0.0]), tie("tied:0", [3.0, 1.0], [0.0])]
    found = metrics(rows)
    ties = found["ties"]["score"]
    assert found["score"] == pytest.approx((3 + 0 + ties) / 6) and found["incomplete"] == []
    assert [part["subset"] for part in found["parts"]] == list(SUBSETS)


def test_without_a_subset_there_is_no_official_score():
    found = metrics([row("Math", [1.0], [0.0])])
    assert found["score"] is None and "ties" not in found
    assert found["incomplete"] == ["no rows of Factuality, Precise IF, Safety, Focus, Ties"]


def test_scores_are_those_of_the_package():
    draw = np.random.default_rng(0)

    def scores(count: int) -> list[float]:
        return draw.integers(-3, 4, count).astype(float).tolist()  # many equal ones

    best_of = [scores(4) for _ in range(200)]
    sets = [
        [
            tie(f"{kind}:{number}", scores(1 if kind == "ref" else draw.integers(1, 6)), scores(3))
            for number in draw.choice(20, size=draw.integers(12, 20), replace=False)
            for kind in ("ref", "tied")
        ]
        for _ in range(60)
    ]
    sets[0] = sets[0][1:-1]  # two rows without the other one of their pair
    subsets = {
        name: float(draw.random()) for part in reward_bench.SECTIONS.values() for name in part
    }
    asked = {
        "best_of": best_of,
        "ties": [
            [
                {
                    "id": one.id,
                    "scores": [*one.correct, *one.wrong],
                    "num_correct": len(one.correct),
                }
                for one in rows
            ]
            for rows in sets
        ],
        "subsets": subsets,
    }
    said = ask_package(asked)
    (mine,) = metrics([row("Focus", one[:1], one[1:]) for one in best_of])["parts"]
    assert mine["score"] == pytest.approx(np.mean(said["best_of"]), abs=1e-12)
    assert [ties_metrics(rows)["score"] for rows in sets] == pytest.approx(said["ties"], abs=1e-12)
    assert reward_bench.section_scores(subsets) == pytest.approx(said["sections"], abs=1e-12)


GOOD = {"id": "7", "prompt": "a", "chosen": ["b"], "rejected": ["c", "d", "e"], "subset": "Math"}


def parse(**changed: object) -> object:
    return reward_bench_2.FORMAT.parse({**GOOD, **changed}, "here")


def test_a_row():
    found = parse(subset="precise if", num_correct=1)
    assert (found.prompt, found.answers, found.part) == ("a", ("b", "c", "d", "e"), "Precise IF")
    assert parse(subset="Ties", id="tied:12", chosen=["b", "x"]).correct == ("b", "x")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"subset": "Chat"}, "subset is 'Chat', not one of Factuality"),
        ({"subset": None}, "subset is empty, not text"),
        ({"chosen": "b"}, "chosen is str, not a list of texts"),
        ({"rejected": []}, "rejected holds 0 texts"),
        ({"rejected": ["c", 3]}, "rejected is int, not text"),
        ({"prompt": ["a"]}, "prompt is list, not text"),
        ({"prompt": "\ud800"}, "prompt is not Unicode text"),
        ({"chosen": ["b", "x"]}, "chosen holds 2 texts, which only Ties may have"),
        ({"num_correct": 2}, "num_correct is 2, chosen holds 1 texts"),
        ({"subset": "Ties"}, "id is '7', which is ref:N or tied:N in Ties"),
    ],
)
def test_a_row_that_is_not_one(changed: dict[str, Any], message: str):
    from denserl_cli.core.data.row_formats import UnusableRow

    with pytest.raises(UnusableRow) as caught:
        parse(**changed)
    assert caught.value.reason.startswith(message)
