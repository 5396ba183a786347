"""Rows that cannot be used: counted, listed, and refused where the recipe is strict."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from denserl_cli.core.data.unusable import TIE
from denserl_cli.core.errors import DenserlError
from denserl_cli.core.system.distributed import is_main_process
from denserl_cli.core.system.files import write_text

if TYPE_CHECKING:
    from denserl_cli.core.observer import Observer


_PLACES = 3


class Skipped(NamedTuple):
    """A row that cannot be used, where it is and why."""

    origin: str
    reason: str
    detail: str


def check_usable(usable: int, skipped: Sequence[Skipped], *, strict: bool) -> None:
    """Raise DenserlError when no row is usable, or when `strict` and one row is not.

    A tie that a source leaves out is no fault of its row.
    """
    faulty = [row for row in skipped if row.reason != TIE]
    if usable and not (strict and faulty):
        return
    what = f"{len(faulty)} rows cannot be used" if usable else "no usable row"
    ways = "mend the rows, or set data.strict to false to skip them" if usable else "mend the rows"
    raise DenserlError(
        "\n".join([what, *skipped_report(faulty or skipped)]),
        hint=f"{ways}; or say how they are to be read: `denserl data PATH` shows their columns, "
        "docs/data.md the layouts",
    )


def skipped_report(skipped: Sequence[Skipped]) -> list[str]:
    """One line a reason, the most frequent first: how many rows, where and why the first ones."""
    found = defaultdict(list)
    for row in skipped:
        found[row.reason].append(row)
    lines = []
    for reason, rows in sorted(found.items(), key=lambda item: -len(item[1])):
        places = ", ".join(row.origin for row in rows[:_PLACES])
        more = f" and {len(rows) - _PLACES} more" if len(rows) > _PLACES else ""
        detail = f" ({rows[0].detail})" if rows[0].detail else ""
        lines.append(f"{len(rows)} x {reason}: {places}{more}{detail}")
    return lines


def write_skipped(path: Path, skipped: Sequence[Skipped]) -> None:
    """Write the skipped rows as JSON Lines: origin, reason, detail."""
    write_text(path, "".join(json.dumps(row._asdict()) + "\n" for row in skipped))


def list_skipped(skipped: Sequence[Skipped], file: Path, observer: Observer) -> None:
    """List every skipped row in a file of the run folder."""
    if not skipped or not is_main_process():
        return
    write_skipped(file, skipped)
    observer.notice(f"all skipped rows are listed in {file}")


def count_skipped(skipped: Sequence[Skipped], observer: Observer) -> None:
    """Say how many rows were skipped and why."""
    for line in skipped_report(skipped):
        observer.notice(f"skipped {line}")
