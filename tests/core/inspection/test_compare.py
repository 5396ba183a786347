"""Two cuts of the same responses: by hand, and through the ways to name the other one."""

from __future__ import annotations

from pathlib import Path

import pytest

from denserl_cli.core.errors import DenserlError
from denserl_cli.core.inspection.compare import Other, View, agreement
from denserl_cli.core.inspection.inspector import Inspector, answers_of
from denserl_cli.core.inspection.traces import Segment, SegmentedResponse
from denserl_cli.core.observer import Observer
from denserl_cli.core.runs.folder import RunFolder
from tests import tiny


def response(*texts: str) -> SegmentedResponse:
    segments = [Segment(text, 0, 0, None, None, None, None) for text in texts]
    return SegmentedResponse("r", "", "p", True, segments, None)


def test_agreement_by_hand():
    first = [response("ab", " cd", " ef"), response("x")]
    second = [response("ab ", "c", "d ef"), response("x", "y")]
    found = agreement(first, second)
    assert found.segments == (4, 5)
    assert found.boundaries == (2, 2) and found.shared == 1
    assert found.f1 == 0.5


def test_only_the_text_that_both_read_counts():
    found = agreement([response("ab", "cd", "ef")], [response("ab", "cd")])
    assert (found.boundaries, found.shared, found.f1) == ((1, 1), 1, 1.0)


def test_nothing_to_disagree_about():
    assert agreement([response("ab")], [response("ab")]).f1 == 1.0


def first_view(folder: Path) -> tuple[Inspector, View, list]:
    recipe = tiny.recipe()
    inspector = Inspector(recipe, RunFolder(folder, recipe), Observer())
    answers = answers_of(inspector.recipe, 3, Observer())
    return inspector, View.of("here", inspector, answers, Observer()), answers


def test_cutoffs_runs_and_models_can_be_compared_with(scored: Path):
    inspector, first, answers = first_view(scored)
    own = [first.cut(trace) for trace in first.traces]
    model = str(scored / "sandbox" / "model")
    for name, words in (
        ("1.0", "cutoff 1"),
        (str(scored), "sandbox-segment, cutoff 1"),
        (model, f"{model}, cutoff 1"),
    ):
        other = Other.named(name, inspector.recipe, scored)
        view = other.view(first, answers, Observer())
        theirs = [view.cut(trace) for trace in view.traces]
        assert view.name == words
        assert agreement(own, theirs).f1 == 1.0
        assert (theirs[0].score is None) == (name == model)
    all_in_one = Other.named("99", inspector.recipe, scored).view(first, answers, Observer())
    found = agreement(own, [all_in_one.cut(trace) for trace in all_in_one.traces])
    assert found.boundaries[1] == 0 and found.f1 == 0.0


@pytest.mark.parametrize("name", ["-1", "nan", "inf"])
def test_a_number_that_is_no_cutoff(name: str, tmp_path: Path):
    with pytest.raises(DenserlError, match="cannot be a cutoff"):
        Other.named(name, tiny.recipe(), tmp_path)


def test_what_is_nothing_is_said_to_be_nothing(tmp_path: Path):
    with pytest.raises(DenserlError, match="neither a number nor a run folder nor a recipe"):
        Other.named("gone/away", tiny.recipe(), tmp_path)
