"""Ranked answers to one prompt, and the preference pairs they make."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations, product
from typing import Any, Literal, NamedTuple

from denserl_cli.core.data.column_paths import has_every, look_up
from denserl_cli.core.data.messages import Turns
from denserl_cli.core.data.unusable import TIE, UnusableRow, shown
from denserl_cli.core.recipe.schema import Columns

_TIES = {
    *("tie", "both", "bothbad", "both_bad", "both bad", "tie (bothbad)", "tie (both bad)"),
    *("equal", "same", "draw", "neither", "a=b", "b=a", "a==b", "none", "[[c]]"),
}
_PLACES = {"first": 0, "left": 0, "second": 1, "right": 1}
_ORDER = re.compile(r"([ab])\s*(>{1,2}|<{1,2})\s*([ab])")
_SIDE_NAME = re.compile(
    r"(?:(?:model|response|answer|output|assistant|completion|candidate|option|system|choice"
    r"|conversation|generation|reply|text)[ _-]?)?([a-z]|\d+)"
)
_MARK = re.compile(r"(?:\A|(?<=[_\W])|(?<=[a-z])(?=[A-Z]))([A-Za-z])(?=\Z|[_\W]|[A-Z][a-z])|(\d+)")
"""A letter or number in the name of a column that tells its answer from the others."""
_MEANINGS = ("first", "second", "tie", "skip")


class Comparison(NamedTuple):
    """Answers to one prompt and how good they are.

    levels: one for each answer, higher is better; only their order counts. margin: by how much the
    better of two answers is better, if the row says so.
    """

    prompt: Turns
    answers: tuple[str, ...]
    levels: tuple[float, ...]
    margin: float | None


class PairRow(NamedTuple):
    """A preference pair, or a ranking: conversations that differ in their last, an assistant turn.

    others: those between the best and the worst one, the better first.
    """

    chosen: Turns
    rejected: Turns
    margin: float | None
    others: tuple[Turns, ...] = ()


def paths_of(value: str | Sequence[str] | None) -> tuple[str, ...]:
    """One path or several as a tuple."""
    if value is None:
        return ()
    return (value,) if isinstance(value, str) else tuple(value)


def named_values(fields: Mapping[str, Any], paths: Sequence[str]) -> list[tuple[str, Any]]:
    """The values at paths, each with its path; a path with `[*]` gives all of its list."""
    found: list[tuple[str, Any]] = []
    for path in paths:
        value = look_up(fields, path)
        if has_every(path) and path not in fields:
            found += [(path, item) for item in value or ()]
        else:
            found.append((path, value))
    return found


def answer_levels(
    fields: Mapping[str, Any], columns: Columns, answers: Sequence[tuple[str, Any]]
) -> list[float]:
    """How good each answer is, from `better`, `scores` or `rank`; higher is better.

    answers: with their paths. Raises UnusableRow where the row does not say.
    """
    if columns.better is not None:
        best = _better(fields, columns, answers)
        return [float(place == best) for place in range(len(answers))]
    name = "scores" if columns.scores is not None else "rank"
    values = named_values(fields, paths_of(getattr(columns, name)))
    if len(values) != len(answers):
        raise UnusableRow(
            f"wrong number of {name}",
            f"columns.{name}: found {len(values)} for {len(answers)} answers",
        )
    sign = 1.0 if name == "scores" else -1.0
    return [sign * number(value, path, f"bad {name}") for path, value in values]


def number(value: object, path: str, reason: str) -> float:
    """A finite number, also where it is written as text or as true and false.

    Raises UnusableRow.
    """
    found = None
    if isinstance(value, bool | int | float):
        found = value
    elif isinstance(value, str):
        try:
            found = float(value)
        except ValueError:
            found = {"true": True, "false": False}.get(value.strip().lower())
    if found is None or not abs(found) <= sys.float_info.max:
        raise UnusableRow(reason, f"column {path}: found {shown(value)}, wanted a number")
    return float(found)


def read_margin(fields: Mapping[str, Any], columns: Columns) -> float | None:
    """The margin of a row, if it has one. Raises UnusableRow for what is no number."""
    if columns.margin is None:
        return None
    value = look_up(fields, columns.margin)
    if value is None or isinstance(value, bool):
        if value is None:
            return None
        raise UnusableRow("bad margin", f"column {columns.margin}: found {value}, wanted a number")
    margin = number(value, columns.margin, "bad margin")
    return abs(margin) if columns.margin == columns.better else margin


def ranked_pairs(
    levels: Sequence[float],
    how: Literal["best-worst", "all", "product"],
    ties: Literal["skip", "keep-as-half"],
) -> list[tuple[int, int]]:
    """The places of the better and the worse answer of each pair that a comparison makes.

    Args:
        levels: how good each answer is, higher is better.
        how: `best-worst`: the best and the worst one, the first of several; `all`: every two
            answers; `product`: each of the best with each of the worst.
        ties: what becomes of two equally good answers: left out, or a pair in each order.
    """
    high, low = max(levels), min(levels)
    if how == "all":
        chosen = list(combinations(range(len(levels)), 2))
    elif high == low:
        chosen = [(0, 1)]
    elif how == "product":
        places = range(len(levels))
        best = [place for place in places if levels[place] == high]
        chosen = list(product(best, [place for place in places if levels[place] == low]))
    else:
        chosen = [(levels.index(high), levels.index(low))]
    return [pair for one in chosen for pair in _ordered(one, levels, ties)]


def pair_row(comparison: Comparison, *places: int) -> PairRow:
    """Some of the answers as a pair or a ranking. places: of the answers, the best first."""
    answers = ({"role": "assistant", "content": comparison.answers[place]} for place in places)
    best, *others, worst = ([*comparison.prompt, answer] for answer in answers)
    return PairRow(best, worst, comparison.margin, tuple(others))


def ranking(comparison: Comparison) -> list[int]:
    """The places of all answers, the best one first.

    Raises:
        UnusableRow: Two of the answers are equally good, or the same.
    """
    answers, levels = comparison.answers, comparison.levels
    if len(set(levels)) < len(levels):
        equal = sum(levels.count(level) > 1 for level in levels)
        detail = f"{equal} of {len(levels)} answers are equally good, and a ranking has one order"
        raise UnusableRow(TIE, detail)
    if len(set(answers)) < len(answers):
        raise UnusableRow("identical answers")
    return sorted(range(len(levels)), key=lambda place: -levels[place])


def _ordered(
    pair: tuple[int, int], levels: Sequence[float], ties: str
) -> Iterator[tuple[int, int]]:
    first, second = pair
    if levels[first] > levels[second]:
        yield first, second
    elif levels[first] < levels[second]:
        yield second, first
    elif ties == "keep-as-half":
        yield first, second
        yield second, first


def _better(
    fields: Mapping[str, Any], columns: Columns, answers: Sequence[tuple[str, Any]]
) -> int | None:
    """The place of the better answer; None: they are equally good."""
    path, how = str(columns.better), columns.better_values or "name"
    value = look_up(fields, path)
    if value is None or value == "":
        raise UnusableRow("no preference", f"column {path} is empty")
    if isinstance(how, Mapping):
        return _by_mapping(value, how, path)
    if how == "name":
        return _by_name(value, path, answers)
    found = number(value, path, "bad preference")
    if how == "sign":
        return None if found == 0 else int(found > 0)
    return _by_index(found - (how == "index-from-1"), value, path, len(answers))


def _by_index(place: float, value: object, path: str, count: int) -> int | None:
    """A place from 0; between two answers a fraction leans to one of them or is a tie."""
    if count == 2 and 0 <= place <= 1:
        return None if place == 0.5 else round(place)
    if place != math.floor(place) or not 0 <= place < count:
        raise UnusableRow(
            "bad preference",
            f"column {path}: found {shown(value)}, which is none of the {count} answers; see "
            "columns.better_values",
        )
    return int(place)


def _by_mapping(value: object, meanings: Mapping[str, Any], path: str) -> int | None:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = str(value).lower() if isinstance(value, bool) else str(value).strip()
    meaning = meanings.get(text)
    if meaning not in _MEANINGS:
        known = ", ".join(meanings)
        raise UnusableRow(
            "bad preference",
            f"column {path}: found {shown(value)}, columns.better_values has {known}",
        )
    if meaning == "skip":
        raise UnusableRow("left out", f"column {path} is {shown(value)}, which better_values skips")
    return {"first": 0, "second": 1}.get(str(meaning))


def _by_name(value: object, path: str, answers: Sequence[tuple[str, Any]]) -> int | None:
    """The answer that a text names: A>B, model_a, its column, the answer itself; or a tie."""
    if isinstance(value, str):
        names = [name for name, _ in answers]
        if value in names:
            return names.index(value)
        texts = [answer.strip() if isinstance(answer, str) else None for _, answer in answers]
        quoted = texts.index(value.strip()) if value.strip() in texts else None
        text = value.strip().lower()
        if text in _TIES and quoted is None:
            return None
        named = _named_place(text, names)
        if quoted is not None and named not in (None, quoted):
            raise UnusableRow(
                "bad preference",
                f"column {path}: found {shown(value)}, the name of one answer and the text of "
                "another; say in columns.better_values which it means",
            )
        if named is not None or quoted is not None:
            return quoted if named is None else named
    raise UnusableRow(
        "bad preference",
        f"column {path}: found {shown(value)}, wanted A>B, model_a, tie or an answer's column; say "
        "how to read it in columns.better_values",
    )


def _named_place(text: str, names: Sequence[str]) -> int | None:
    """The answer that `a>b`, `first`, or a letter or number at the end of the text stands for.

    `model_a` is `response_a` among the names, in whatever order they are.
    """
    if len(names) == 2 and text in _PLACES:
        return _PLACES[text]
    text = text.strip("[]")
    order = _ORDER.fullmatch(text) if len(names) == 2 else None
    if order and order[1] != order[3]:
        text = order[1] if order[2].startswith(">") else order[3]
    match = _SIDE_NAME.fullmatch(text)
    if match is None:
        return None
    mark, marks = match[1], _marks(names)
    if mark in marks:
        return marks.index(mark)
    place = ord(mark) - ord("a") if mark.isalpha() else len(names)
    return place if place < len(names) and marks == sorted(marks) else None


def _marks(names: Sequence[str]) -> list[str]:
    """The letter or number that tells each name from the others, in lower case; empty without."""
    found = [[(one[1] or one[2]).lower() for one in _MARK.finditer(name)] for name in names]
    last = [marks[-1] for marks in found if marks]
    if len(set(last)) == len(names):
        return last
    others = [set().union(*found[:place], *found[place + 1 :]) for place in range(len(names))]
    own = [set(marks) - rest for marks, rest in zip(found, others, strict=True)]
    return [min(marks) for marks in own] if all(len(marks) == 1 for marks in own) else []
