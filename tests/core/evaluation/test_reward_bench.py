"""RewardBench's sections against its published weights."""

from __future__ import annotations

import pytest

from denserl_cli.core.evaluation import reward_bench


def test_sizes_are_those_of_the_benchmark():
    sizes = {name: sum(subsets.values()) for name, subsets in reward_bench.SECTIONS.items()}
    assert sizes == {"Chat": 358, "Chat Hard": 456, "Safety": 740, "Reasoning": 2 * 984}
    assert sum(sizes.values()) - 984 + 447 == 2985


def test_a_section_is_weighted_by_rows():
    scores = reward_bench.section_scores({"mt-bench-hard": 1.0, "llmbar-natural": 0.0})
    assert scores == {"Chat Hard": pytest.approx(37 / 137)}


def test_mathematics_count_as_much_as_all_code():
    subsets = dict.fromkeys(reward_bench.SECTIONS["Reasoning"], 0.0)
    assert reward_bench.section_scores({**subsets, "math-prm": 1.0}) == {"Reasoning": 0.5}


def test_all_subsets():
    accuracies = {
        subset: 0.25 * place
        for place, subsets in enumerate(reward_bench.SECTIONS.values(), 1)
        for subset in subsets
    }
    scores = reward_bench.section_scores(accuracies)
    assert scores == pytest.approx(
        {"Chat": 0.25, "Chat Hard": 0.5, "Safety": 0.75, "Reasoning": 1.0}
    )
    assert reward_bench.absent(accuracies) == []


def test_both_names_of_one_subset():
    assert reward_bench.section_of("mt-bench-medium") == reward_bench.section_of("mt-bench-med")
    assert reward_bench.section_scores({"mt-bench-medium": 1.0}) == {"Chat": 1.0}
    assert "mt-bench-med" not in reward_bench.absent({"mt-bench-medium": 1.0})


def test_what_is_no_subset_is_no_part_of_a_section():
    assert reward_bench.section_of("mine") == reward_bench.OTHER
    assert reward_bench.section_scores({"mine": 1.0}) == {}
    assert len(reward_bench.absent({"mine": 1.0})) == 23
