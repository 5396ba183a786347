"""Which answer is better, in all the ways that rows say it, and the pairs that follow."""

from __future__ import annotations

from typing import Any

import pytest

from denserl_cli.core.data.column_paths import look_up
from denserl_cli.core.data.comparisons import answer_levels, ranked_pairs, read_margin
from denserl_cli.core.data.row_formats import RowReader
from denserl_cli.core.data.unusable import UnusableRow
from denserl_cli.core.recipe.data_formats import RowMapping
from denserl_cli.core.recipe.schema import Columns

AB = ("response_a", "response_b")
TWO = (("response_1", "one"), ("response_2", "two"))


def better(value: Any, how: Any = None, names: Any = AB) -> int | None:
    """The place of the better of two answers; None for a tie."""
    answers = [(name, f"text of {name}") for name in names]
    columns = Columns(answers=names, better="winner", better_values=how)
    levels = answer_levels({"winner": value}, columns, answers)
    return levels.index(1.0) if 1.0 in levels else None


@pytest.mark.parametrize(
    ("value", "place"),
    [
        *((value, 0) for value in ("A>B", "a>>b", "A", "model_a", "Model A", "response_a", "left")),
        *((value, 1) for value in ("B>A", "[[B]]", "b", "assistant_b", "text of response_b")),
        *((value, None) for value in ("tie", "Tie (bothbad)", "both_bad", "A=B", "same")),
    ],
)
def test_a_name_says_which_is_better(value: str, place: int | None) -> None:
    assert better(value) == place


@pytest.mark.parametrize(
    ("names", "value", "place"),
    [
        (("response_1", "response_2"), "1", 0),
        (("response_1", "response_2"), "model_2", 1),
        (("answer_0", "answer_1"), "1", 1),
        (("answer_0", "answer_1"), "a", 0),
        (("outputA", "outputB"), "B", 1),
        (("first", "second"), "second", 1),
        (("response_b", "response_a"), "A>B", 1),
        (("response_b", "response_a"), "B << A", 1),
        (("model_b_text", "model_a_text"), "model_a", 1),
        (("b.text", "a.text"), "A", 1),
        (("textB", "textA"), "[[A]]", 1),
        (("turn_1_answer_2", "turn_1_answer_1"), "1", 1),
        (("answers[0].text", "answers[1].text"), "b", 1),
        (("answer_b_v1", "answer_a_v1"), "A>B", 1),
    ],
)
def test_letters_and_numbers_are_those_of_the_columns(names: Any, value: str, place: int) -> None:
    assert better(value, names=names) == place


@pytest.mark.parametrize("value", ["A", "A>B", "model_b"])
def test_a_letter_for_numbered_answers_in_another_order_is_refused(value: str) -> None:
    for names in (("response_2", "response_1"), ("gpt4", "gpt3")):
        with pytest.raises(UnusableRow, match="bad preference"):
            better(value, names=names)


def test_a_label_that_is_the_text_of_the_other_answer_is_refused() -> None:
    columns = Columns(answers=AB, better="winner")
    answers = [(AB[0], "B"), (AB[1], "A")]
    with pytest.raises(UnusableRow) as caught:
        answer_levels({"winner": "A"}, columns, answers)
    assert "the text of another" in caught.value.detail


@pytest.mark.parametrize("value", ["gamma", "claude-b", "3", 1, True, "c", "model_x", "bad"])
def test_a_name_that_may_be_anything_is_refused(value: object) -> None:
    with pytest.raises(UnusableRow) as caught:
        better(value)
    assert caught.value.reason == "bad preference" and repr(value) in caught.value.detail


@pytest.mark.parametrize(
    ("value", "how", "place"),
    [
        (0, "index-from-0", 0),
        ("1", "index-from-0", 1),
        (True, "index-from-0", 1),
        ("false", "index-from-0", 0),
        (1, "index-from-1", 0),
        ("2.0", "index-from-1", 1),
        (1.5, "index-from-1", None),
        (1.98, "index-from-1", 1),
        (-3, "sign", 0),
        ("+2", "sign", 1),
        (0.0, "sign", None),
        ("up", {"up": "first", "down": "second"}, 0),
        (2.0, {"1": "first", "2": "second"}, 1),
        (True, {"true": "first", "false": "second"}, 0),
        ("even", {"even": "tie"}, None),
    ],
)
def test_a_number_or_a_mapping_says_which_is_better(
    value: object, how: Any, place: int | None
) -> None:
    assert better(value, how) == place


@pytest.mark.parametrize(
    ("value", "how", "reason"),
    [
        (2, "index-from-0", "bad preference"),
        (0, "index-from-1", "bad preference"),
        ("much", "sign", "bad preference"),
        (float("nan"), "sign", "bad preference"),
        (None, "sign", "no preference"),
        ("", "name", "no preference"),
        ("sideways", {"up": "first"}, "bad preference"),
        ("unsure", {"unsure": "skip"}, "left out"),
    ],
)
def test_a_preference_that_says_nothing_is_refused(value: object, how: Any, reason: str) -> None:
    with pytest.raises(UnusableRow) as caught:
        better(value, how)
    assert caught.value.reason == reason and "winner" in caught.value.detail


def test_scores_and_ranks_order_the_answers() -> None:
    values = [("answers[*].text", "a"), ("answers[*].text", "b")]
    row = {"answers": [{"s": "5", "r": 1}, {"s": 2.5, "r": "2"}]}
    assert answer_levels(row, Columns(scores="answers[*].s"), values) == [5.0, 2.5]
    assert answer_levels(row, Columns(rank="answers[*].r"), values) == [-1.0, -2.0]
    assert answer_levels({"x": True, "y": False}, Columns(scores=("x", "y")), values) == [1.0, 0.0]
    with pytest.raises(UnusableRow, match="wrong number of scores"):
        answer_levels({"x": 1}, Columns(scores="x"), values)


LEVELS = [2.0, 3.0, 1.0, 3.0]


@pytest.mark.parametrize(
    ("how", "ties", "pairs"),
    [
        ("best-worst", "skip", [(1, 2)]),
        ("all", "skip", [(1, 0), (0, 2), (3, 0), (1, 2), (3, 2)]),
        ("all", "keep-as-half", [(1, 0), (0, 2), (3, 0), (1, 2), (1, 3), (3, 1), (3, 2)]),
        ("product", "skip", [(1, 2), (3, 2)]),
    ],
)
def test_ranked_answers_become_pairs(how: Any, ties: Any, pairs: list[tuple[int, int]]) -> None:
    assert ranked_pairs(LEVELS, how, ties) == pairs


@pytest.mark.parametrize("how", ["best-worst", "all", "product"])
def test_a_tie_is_left_out_or_one_pair_in_each_order(how: Any) -> None:
    assert ranked_pairs([1.0, 1.0], how, "skip") == []
    assert ranked_pairs([1.0, 1.0], how, "keep-as-half") == [(0, 1), (1, 0)]


def test_a_margin_is_the_strength_of_a_signed_preference() -> None:
    assert read_margin({"p": "-3"}, Columns(better="p", margin="p")) == 3.0
    assert read_margin({"p": -3}, Columns(margin="p")) == -3.0
    assert read_margin({}, Columns(margin="p")) is None


def test_columns_are_found_by_paths() -> None:
    row = {"a": {"b": [{"c": 1}, {"c": 2}, {}]}, "a.b": "dotted", "j": '{"k": ["x", "y"]}'}
    assert look_up(row, "a.b") == "dotted"
    assert look_up({"a": row["a"]}, "a.b[*].c") == [1, 2, None]
    assert look_up(row, "j.k[-1]") == "y"
    assert look_up(row, "j.k[5]") is None and look_up(row, "none.at.all") is None
    columns = {"a": {"text": ["x", "y"], "rank": [1, 2]}}
    assert look_up(columns, "a[*].text") == ["x", "y"] and look_up(columns, "a[1].rank") == 2
    for path in ("n[*]", "n.m.l", "a.b.c", "j.k.l"):
        with pytest.raises(UnusableRow, match="wrong type"):
            look_up({"a": row["a"], "j": row["j"], "n": {"m": 1}}, path)


def test_texts_and_messages_of_several_columns_are_one_prompt() -> None:
    columns = Columns(
        prompt=("past", "question", "input"), system="rules", chosen="good", rejected="bad"
    )
    row = {
        "past": [["one", "two"]],
        "question": "three",
        "input": "four",
        "rules": "be kind",
        "good": "a",
        "bad": "b",
    }
    reader = RowReader(RowMapping(columns=columns))
    turns = [(turn["role"], turn["content"]) for turn in reader.pairs(row)[0].chosen]
    assert turns == [
        ("system", "be kind"),
        ("user", "one"),
        ("assistant", "two"),
        ("user", "three\n\nfour"),
        ("assistant", "a"),
    ]
    row["input"] = ""
    assert reader.pairs(row)[0].chosen[3]["content"] == "three"
    del row["rules"]
    reader.pairs(row)
    assert any("rules" in remark for remark in reader.remarks)
