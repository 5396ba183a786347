"""What makes no sense in a source's mapping of columns."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from denserl_cli.core.recipe.data_formats import given_columns, row_mappings
from denserl_cli.core.recipe.schema import Columns, RewardModelConfig, Source

_PATH = re.compile(r"[^.\[\]]+(\[(\*|-?\d+)\]|\.[^.\[\]]+)*")
_ROLES = ("system", "user", "assistant")
_MEANINGS = ("first", "second", "tie", "skip")
_PREFERENCES = ("better", "scores", "rank")
_STEPS = ("completions", "labels")


class Problem(NamedTuple):
    """Something that makes no sense: the key to change, what and what to do, and why.

    rests_on: the other keys whose values the judgement depends on.
    """

    key: str
    message: str
    rests_on: tuple[str, ...] = ()


def mapping_problems(key: str, source: Source) -> Iterator[Problem]:
    """Yield what contradicts itself in a source's columns, roles and groups.

    key: of the source in the recipe.
    """
    for name, meaning in source.roles.items():
        if meaning not in _ROLES:
            message = f"must be system, user or assistant, not {meaning!r}"
            yield Problem(f"{key}.roles.{name}", message)
    if source.pairs == "ranking" and source.ties == "keep-as-half":
        message = "a ranking has no equally good answers; set it to skip"
        yield Problem(f"{key}.ties", message, (f"{key}.pairs",))
    columns = row_mappings(source)[0].columns
    if source.group_by is not None:
        yield from _path_problems(f"{key}.group_by", source.group_by)
        if columns is None or not isinstance(columns.answers, str) or columns.better:
            advice = "rows with one answer each need columns.answers, and scores or rank"
            yield Problem(f"{key}.group_by", advice, (f"{key}.columns",))
    if columns is None:
        return
    for name, value in given_columns(columns).items():
        if name != "better_values":
            for path in [value] if isinstance(value, str) else value:
                yield from _path_problems(f"{key}.columns.{name}", path)
    if source.columns is not None and any(getattr(source.columns, name) for name in _STEPS):
        yield from _step_problems(key, source, source.columns)
    elif source.columns is not None:
        yield from _column_problems(f"{key}.columns", source.columns, columns)


def ranking_problems(
    settings: RewardModelConfig, sources: Mapping[str, Source]
) -> Iterator[Problem]:
    """Yield what the loss of pairs has and that of rankings has not.

    sources: of preferences, by their keys in the recipe.
    """
    for key, source in sources.items():
        if source.pairs != "ranking":
            continue
        for name in ("target_margin", "label_smoothing"):
            if getattr(settings, name):
                message = f"has no meaning for {key}.pairs: ranking; set it to 0"
                yield Problem(f"reward_model.{name}", message, (f"{key}.pairs",))
        if source.columns is not None and source.columns.margin and settings.margins != "ignore":
            message = f"{settings.margins} has no meaning for {key}.pairs: ranking; use ignore"
            rests_on = (f"{key}.pairs", f"{key}.columns.margin")
            yield Problem("reward_model.margins", message, rests_on)


def _path_problems(key: str, path: str) -> Iterator[Problem]:
    if not _PATH.fullmatch(path):
        yield Problem(key, f"{path!r} is not a column or a path such as answers[*].text")


def _column_problems(key: str, own: Columns, columns: Columns) -> Iterator[Problem]:
    """Answers, and what says which of them is better, each given in one way."""
    sides = [name for name in ("chosen", "rejected") if getattr(own, name) is not None]
    if own.answers is not None and sides:
        yield Problem(f"{key}.answers", "name either answers, or chosen and rejected")
        return
    given = [name for name in _PREFERENCES if getattr(columns, name) is not None]
    if columns.answers is not None and len(given) != 1:
        found = " and ".join(given) or "none of them"
        yield Problem(key, f"answers need better, scores or rank, one of them; found {found}")
    if columns.answers is None and given:
        message = "chosen and rejected say which is better; name the answers in columns.answers"
        yield Problem(f"{key}.{given[0]}", message)
    yield from _better_problems(f"{key}.better_values", columns)


def _step_problems(key: str, source: Source, own: Columns) -> Iterator[Problem]:
    """Steps with labels are not compared with other answers."""
    compared = ("chosen", "rejected", "answers", *_PREFERENCES, "better_values", "margin")
    for name in compared:
        if getattr(own, name) is not None:
            message = "completions and labels are steps of one answer, with nothing to compare"
            yield Problem(f"{key}.columns.{name}", message)
    for name in ("format", "pairs", "group_by"):
        if getattr(source, name) is not None:
            message = "does not belong to steps with labels; leave it out"
            yield Problem(f"{key}.{name}", message, (f"{key}.columns",))


def _better_problems(key: str, columns: Columns) -> Iterator[Problem]:
    values: Any = columns.better_values
    if values is not None and columns.better is None:
        yield Problem(key, "belongs together with better")
    if isinstance(values, dict):
        for value, meaning in values.items():
            if meaning not in _MEANINGS:
                message = f"{value}: must be first, second, tie or skip, not {meaning!r}"
                yield Problem(key, message)
