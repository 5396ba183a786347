"""Rows of a source on their way to its mapping: which layout, rewritten or put together first."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from denserl_cli.core.data.column_paths import is_there, look_up
from denserl_cli.core.data.comparisons import number, paths_of
from denserl_cli.core.data.local_files import Row
from denserl_cli.core.data.messages import plain_text
from denserl_cli.core.data.row_checks import found_columns
from denserl_cli.core.data.row_formats import RowReader
from denserl_cli.core.data.skipped import Skipped
from denserl_cli.core.data.trees import step_comparisons, tree_comparisons, trees_of
from denserl_cli.core.data.unusable import UnusableRow
from denserl_cli.core.recipe.data_formats import RowMapping, row_mappings

if TYPE_CHECKING:
    from denserl_cli.core.data.sources import OpenSource
    from denserl_cli.core.recipe.schema import Source

Rows = Iterator[Row | Skipped]
Fields = dict[str, Any]

_STEER_TURN = re.compile(r"\n*<extra_id_1>(User|Assistant)\n")


def read_mapped(
    source: Source,
    opened: OpenSource,
    rng: np.random.Generator,
    watched: Callable[[Rows], Rows] = iter,
) -> tuple[Rows, RowReader]:
    """The rows of a source, `max_samples` of them drawn, and what reads each of them.

    Where several rows make one comparison, comparisons are drawn instead, once all rows are read.

    Args:
        source: how its rows are to be read.
        opened: the source.
        rng: draws rows, or comparisons.
        watched: is given the rows as they come from the source, to hand them on.

    Raises:
        DenserlError: the source as a whole cannot be read.
    """
    mappings, limit = row_mappings(source), source.max_samples
    whole = any(mapping.reads_whole_source for mapping in mappings)
    rows = watched(opened.read(None if whole else limit, rng))
    mapping, rows = _fitting(mappings, rows)
    rows, mapping = _rewritten(mapping, rows)
    if whole and limit is not None:
        rows = _drawn(list(rows), limit, rng)
    return rows, RowReader(mapping)


def fitting_mapping(mappings: Sequence[RowMapping], fields: Fields) -> RowMapping | None:
    """The first mapping whose columns a row has."""
    for mapping in mappings:
        if all(is_there(fields, path) for path in mapping.needs):
            return mapping
    return None


def _fitting(mappings: tuple[RowMapping, ...], rows: Rows) -> tuple[RowMapping, Rows]:
    """The mapping that the first row fits, else the first of all; no row is lost."""
    seen: list[Row | Skipped] = []
    for row in rows if len(mappings) > 1 else ():
        seen.append(row)
        if isinstance(row, Row):
            fitting = fitting_mapping(mappings, row.fields)
            return fitting or mappings[0], chain(seen, rows)
    return mappings[0], chain(seen, rows)


def _rewritten(mapping: RowMapping, rows: Rows) -> tuple[Rows, RowMapping]:
    """Rows as the mapping's reader leaves them, grouped, and the mapping for what they are then."""
    if mapping.reader == "message-trees":
        rows = _expanded(trees_of(rows), tree_comparisons)
    elif mapping.reader == "step-labels":
        rows = _expanded(rows, step_comparisons)
    elif mapping.reader is not None:
        rows = _expanded(rows, _REWRITES[mapping.reader])
    if mapping.group_by is None or mapping.columns is None:
        return rows, mapping
    columns = mapping.columns
    grouped = replace(
        columns,
        answers="grouped_answers[*]",
        scores="grouped_scores[*]" if columns.scores else None,
        rank="grouped_rank[*]" if columns.rank else None,
    )
    return _grouped(rows, mapping), replace(mapping, columns=grouped)


def _expanded(rows: Rows, expand: Callable[[Fields], Iterable[Fields]]) -> Rows:
    """What each row becomes; a row that cannot be rewritten is skipped."""
    for row in rows:
        if isinstance(row, Skipped):
            yield row
            continue
        try:
            for fields in expand(row.fields):
                yield Row(row.origin, fields)
        except UnusableRow as error:
            yield Skipped(row.origin, error.reason, error.detail)


def _grouped(rows: Rows, mapping: RowMapping) -> Rows:
    """One row for each group of rows with one answer each, in the order of their first ones."""
    groups: dict[str, Row] = {}
    assert mapping.columns is not None and mapping.group_by is not None
    answer = str(mapping.columns.answers)
    for row in rows:
        if isinstance(row, Skipped):
            yield row
            continue
        try:
            found = {"grouped_answers": _given(row.fields, answer)}
            for name in ("scores", "rank"):
                for path in paths_of(getattr(mapping.columns, name)):
                    value = number(_given(row.fields, path), path, f"bad {name}")
                    found[f"grouped_{name}"] = value
            key = json.dumps(_given(row.fields, mapping.group_by), sort_keys=True, default=str)
        except UnusableRow as error:
            yield Skipped(row.origin, error.reason, error.detail)
            continue
        first = groups.setdefault(key, Row(row.origin, dict(row.fields)))
        for name, value in found.items():
            first.fields.setdefault(name, []).append(value)
    yield from groups.values()


def _given(fields: Fields, path: str) -> Any:
    """What a row has at a path. Raises UnusableRow for nothing."""
    value = look_up(fields, path)
    if value is None:
        raise UnusableRow(f"no {path}", found_columns(fields))
    return value


def _drawn(rows: list[Row | Skipped], limit: int, rng: np.random.Generator) -> Rows:
    """At most `limit` of the rows, in their order."""
    if limit >= len(rows):
        return iter(rows)
    places = np.sort(rng.choice(len(rows), size=limit, replace=False))
    return (rows[place] for place in places)


def _shared_beginning(fields: Fields) -> Iterator[Fields]:
    """Take the text that both sides begin with, up to its last white space, for the prompt."""
    chosen, rejected = (plain_text(fields.get(name), name) for name in ("chosen", "rejected"))
    start = 0
    for place, (first, second) in enumerate(zip(chosen, rejected, strict=False), 1):
        if first != second:
            break
        start = place if first.isspace() else start
    prompt = chosen[:start].rstrip()
    if not prompt:
        raise UnusableRow("no prompt", "columns chosen and rejected do not begin alike")
    yield {**fields, "prompt": prompt, "chosen": chosen[start:], "rejected": rejected[start:]}


def _steer_turns(fields: Fields) -> Iterator[Fields]:
    """Split a prompt of several turns, which HelpSteer2 parts by `<extra_id_1>` lines."""
    prompt = fields.get("prompt")
    if not isinstance(prompt, str) or "<extra_id_1>" not in prompt:
        yield fields
        return
    first, *parts = _STEER_TURN.split(prompt)
    turns = [{"role": "user", "content": first}] if first.strip() else []
    turns += [
        {"role": speaker.lower(), "content": content}
        for speaker, content in zip(parts[::2], parts[1::2], strict=True)
    ]
    yield {**fields, "prompt": turns}


def _turn_lists(fields: Fields) -> Iterator[Fields]:
    """Put lists of questions and of each model's answers together into two conversations."""
    found = dict(fields)
    for side in ("a", "b"):
        questions, answers = look_up(fields, "prompt[*]"), look_up(fields, f"response_{side}[*]")
        if questions is None or answers is None or len(questions) != len(answers):
            raise UnusableRow(
                "wrong number of turns", f"columns prompt and response_{side} differ in length"
            )
        found[f"conversation_{side}"] = [
            {"role": role, "content": content}
            for pair in zip(questions, answers, strict=True)
            for role, content in zip(("user", "assistant"), pair, strict=True)
        ]
    yield found


_REWRITES: dict[str, Callable[[Fields], Iterable[Fields]]] = {
    "shared-beginning": _shared_beginning,
    "steer-turns": _steer_turns,
    "turn-lists": _turn_lists,
}
