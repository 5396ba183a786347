"""score: the rewards of any responses, from a file or from Python."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from denserl_cli.core.data.local_files import Row, read_lines
from denserl_cli.core.data.row_formats import conversations_of
from denserl_cli.core.data.skipped import Skipped, check_usable, skipped_report
from denserl_cli.core.data.unusable import UnusableRow
from denserl_cli.core.errors import DenserlError
from denserl_cli.core.inspection.inspector import (
    Answer,
    EncodedAnswer,
    Inspector,
    SegmentedResponse,
)
from denserl_cli.core.observer import Observer
from denserl_cli.core.runs.folder import RunFolder

if TYPE_CHECKING:
    from denserl_cli.core.recipe.schema import Recipe

CHUNK = 256
"""Rows that are read, scored in batches of similar length, and written together."""


def score_responses(
    recipe: Recipe,
    run_folder: Path | str,
    conversations: Sequence[Sequence[Mapping[str, str]]],
    observer: Observer | None = None,
) -> list[SegmentedResponse]:
    """Score the last turn of each conversation with the reward model of a run.

    conversations: message lists that end in an assistant turn. Returns them in order, each with its
    score and its segments. Raises DenserlError when there is no reward model, and for a
    conversation that cannot be scored.
    """
    run = RunFolder(Path(run_folder), recipe)
    answers = []
    for number, messages in enumerate(conversations):
        label = f"conversation {number}"
        try:
            turns = conversations_of({"messages": list(messages)})[""]
        except UnusableRow as error:
            what = _told(error.reason, error.detail)
            raise DenserlError(f"{label}: {what}", hint="mend it") from error
        answers.append(Answer(label, turns))
    return Inspector(recipe, run, observer or Observer(), scoring=True).segment(answers)


@dataclass
class Count:
    """What has become of the rows of a file."""

    scored: int = 0
    truncated: int = 0
    skipped: list[Skipped] = field(default_factory=list)


def score_lines(
    inspector: Inspector,
    name: str,
    lines: Iterable[bytes],
    out: BinaryIO,
    observer: Observer,
    *,
    prefix: str = "",
) -> None:
    """Score JSON Lines and write each row, in order, with its scores and segments added.

    A row that cannot be scored gets a null score and an `error`. name: of the lines, for messages.
    prefix: of the names of the fields that are added. Raises DenserlError when no row can be
    scored, when `data.strict` and one cannot, when a row has one of those fields already, and for
    a score that is not a number.
    """
    count, rows = Count(), read_lines(name, lines)
    observer.begin("score responses")
    while chunk := list(islice(rows, CHUNK)):
        for row in _score_rows(inspector, chunk, count, prefix):
            text = json.dumps(row, ensure_ascii=False) + "\n"
            out.write(text.encode("utf-8", "backslashreplace"))  # half a surrogate pair, as JSON
        observer.advance(len(chunk))
    observer.end()
    if not count.scored and not count.skipped:
        raise DenserlError(f"no rows in {name}", hint="give JSON Lines, one conversation a line")
    check_usable(count.scored, count.skipped, strict=inspector.recipe.data.strict)
    for line in skipped_report(count.skipped):
        observer.notice(f"without a score: {line}")
    if count.truncated:
        limit = inspector.recipe.data.max_length
        observer.notice(f"{count.truncated} responses were cut to data.max_length {limit}")


def _score_rows(
    inspector: Inspector, rows: Sequence[Row | Skipped], count: Count, prefix: str
) -> Iterator[dict[str, Any]]:
    """The rows of one chunk with what is added to them."""
    encoded = [_encode(inspector, row) for row in rows]
    flat = [answer for sides in encoded if isinstance(sides, dict) for answer in sides.values()]
    scored = iter(inspector.segment_encoded(flat))
    count.truncated += sum(answer.truncated for answer in flat)
    for row, sides in zip(rows, encoded, strict=True):
        if isinstance(sides, Skipped):
            count.skipped.append(sides)
            error = f"{sides.origin}: {_told(sides.reason, sides.detail)}"
            added = {"score": None, "segments": None, "error": error}
        else:
            count.scored += 1
            added = {}
            for side in sides:
                added |= _fields(next(scored), side)
        yield _extended(row, {f"{prefix}{name}": value for name, value in added.items()})


def _encode(inspector: Inspector, row: Row | Skipped) -> dict[str, EncodedAnswer] | Skipped:
    """The responses of a row by their side, or why there are none."""
    if isinstance(row, Skipped):
        return row
    try:
        return {
            side: inspector.encode(Answer(f"{row.origin} {side}".rstrip(), turns))
            for side, turns in conversations_of(row.fields).items()
        }
    except UnusableRow as error:
        return Skipped(row.origin, error.reason, error.detail)
    except DenserlError as error:  # the chat template cannot write it
        return Skipped(row.origin, error.message, error.hint or "")


def _fields(response: SegmentedResponse, side: str) -> dict[str, Any]:
    """Score and segments, or score_chosen and so on where a row has two sides."""
    suffix = f"_{side}" if side else ""
    names = ("text", "start", "end", "value", "reward")
    segments = [{name: getattr(one, name) for name in names} for one in response.segments]
    return {f"score{suffix}": response.score, f"segments{suffix}": segments}


def _extended(row: Row | Skipped, added: dict[str, Any]) -> dict[str, Any]:
    fields = row.fields if isinstance(row, Row) else {}
    taken = sorted(fields.keys() & added.keys())
    if taken:
        raise DenserlError(
            f"{row.origin}: the row has {', '.join(taken)} already",
            hint="give the new fields other names with --prefix, such as --prefix new_",
        )
    return {**fields, **added}


def _told(reason: str, detail: str) -> str:
    return f"{reason}: {detail}" if detail else reason
