"""Columns by name or path: `question.text`, `turns[0]`, `answers[*].text`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

from denserl_cli.core.data.unusable import UnusableRow, shown

_STEP = re.compile(r"\[(\*|-?\d+)\]|([^.\[\]]+)")
EVERY = object()
"""The step `[*]`."""


@cache
def steps(path: str) -> tuple[Any, ...]:
    """The keys, numbers and `[*]` of a path. Raises ValueError for a text that is none."""
    found: list[Any] = []
    at = 0
    while at < len(path):
        match = _STEP.match(path, at)
        if match is None:
            raise ValueError(f"{path!r} is not a column or a path such as answers[*].text")
        number, name = match.groups()
        found.append(name if name is not None else EVERY if number == "*" else int(number))
        at = match.end()
        if at < len(path) and path[at] == ".":
            at += 1
            if at == len(path) or path[at] in ".[":
                raise ValueError(f"{path!r} is not a column or a path such as answers[*].text")
    if not found or not isinstance(found[0], str):
        raise ValueError(f"{path!r} does not begin with a column's name")
    return tuple(found)


def has_every(path: str) -> bool:
    """Whether a path stands for several values."""
    return EVERY in steps(path)


def top_column(path: str, fields: Iterable[str] = ()) -> str:
    """The column of a path; a column may have dots in its name."""
    return path if path in fields else str(steps(path)[0])


def look_up(fields: Mapping[str, Any], path: str) -> Any:
    """The value at a path, a list of values with `[*]`; None where there is none.

    JSON in a text is read where the path leads into it. Raises UnusableRow for a value that is not
    of the kind that the path expects.
    """
    if path in fields:
        return fields[path]
    return _followed(fields, steps(path), path)


def _followed(value: Any, rest: tuple[Any, ...], path: str) -> Any:
    for place, step in enumerate(rest):
        if value is None:
            return None
        if isinstance(value, str):
            value = _parsed(value, path)
        if step is EVERY or isinstance(step, int):
            value = transposed(value)
        if step is EVERY:
            if not isinstance(value, list):
                raise UnusableRow("wrong type", f"column {path}: found {shown(value)}, not a list")
            return [_followed(item, rest[place + 1 :], path) for item in value]
        if isinstance(step, int):
            if not isinstance(value, list):
                raise UnusableRow("wrong type", f"column {path}: found {shown(value)}, not a list")
            value = value[step] if -len(value) <= step < len(value) else None
        else:
            if not isinstance(value, Mapping):
                raise UnusableRow(
                    "wrong type", f"column {path}: found {shown(value)} in which to look for {step}"
                )
            value = value.get(step)
    return value


def _parsed(text: str, path: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UnusableRow(
            "wrong type", f"column {path}: found the text {shown(text)}, which is not JSON"
        ) from error


def transposed(value: Any) -> Any:
    """A list of objects that is kept as an object of equally long lists; anything else as it is.

    `datasets` returns sequences of objects in this form.
    """
    if not isinstance(value, Mapping) or not value:
        return value
    columns = list(value.values())
    if not all(isinstance(column, list) and len(column) == len(columns[0]) for column in columns):
        return value
    return [dict(zip(value, cells, strict=True)) for cells in zip(*columns, strict=True)]


def is_there(fields: Mapping[str, Any], path: str) -> bool:
    """Whether a row has something at a path."""
    try:
        return look_up(fields, path) is not None
    except UnusableRow:
        return False
