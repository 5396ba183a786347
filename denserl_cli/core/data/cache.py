"""Encoded data on disk: made once, memory-mapped by every process of every later start.

An entry is a folder named by a digest of all that its rows follow from: the content of the data,
which of its rows are drawn, tokenizer, chat format, limits, and the code that encodes.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol
from uuid import uuid4

import numpy as np
import pyarrow as pa

from denserl_cli.core.data import fingerprint
from denserl_cli.core.data.arrow_rows import Batch, Rows
from denserl_cli.core.data.conversations import Count, ReadStats, check_read
from denserl_cli.core.data.local_files import Row
from denserl_cli.core.data.row_formats import RowReader
from denserl_cli.core.data.row_readers import read_mapped
from denserl_cli.core.data.skipped import Skipped
from denserl_cli.core.data.sources import OpenSource, open_source
from denserl_cli.core.errors import DenserlError
from denserl_cli.core.observer import Observer, with_progress
from denserl_cli.core.recipe.data_formats import reading_settings
from denserl_cli.core.system.distributed import (
    all_gather_object,
    barrier,
    from_local_main_process,
    is_local_main_process,
    several_machines,
)
from denserl_cli.core.system.files import sync_folder
from denserl_cli.core.system.lock import locked_in_turn

if TYPE_CHECKING:
    from denserl_cli.core.chat.format import ChatFormat
    from denserl_cli.core.recipe.schema import Source

VARIABLE = "DENSERL_CACHE"
"""Environment variable: the folder for encoded data."""
ROWS, RECORD = "rows.arrow", "entry.json"
_ABANDONED = 86_400.0
"""Seconds after which what was written aside belongs to nobody, also where locks do not reach."""
_BATCH = 2048
"""Rows in a record batch."""


class Encoding(Protocol):
    """How rows become encoded rows."""

    @property
    def chat(self) -> ChatFormat:
        """How conversations are written."""

    @property
    def stored(self) -> type[Rows[Any]]:
        """What encoded rows are kept as."""

    @property
    def limits(self) -> dict[str, int]:
        """Limits to the number of ids."""

    def parse(
        self, rows: Iterable[Row | Skipped], reader: RowReader, stats: ReadStats
    ) -> Iterator[Any]:
        """What the usable rows hold."""

    def encode(self, items: Iterable[Any]) -> Iterator[Any]:
        """Each of them as an encoded row or, where it cannot be encoded, as a skipped one."""


@dataclass(frozen=True)
class Entry:
    """What one source has become.

    usable: rows that hold what they should. failed: those of them that cannot be encoded, by their
    number. random: the generator's state when the rows had been drawn; None when none was drawn.
    """

    batches: list[Batch]
    usable: int
    failed: dict[int, Skipped]
    stats: ReadStats
    random: dict[str, Any] | None


class _Wanted(NamedTuple):
    """An entry that is to be there."""

    source: Source
    opened: OpenSource
    rows: int | None
    draw: list[int]
    settings: dict[str, Any]

    @property
    def path(self) -> Path:
        return folder() / "data" / fingerprint.of_settings(self.settings)


def folder() -> Path:
    """Where encoded data are kept: $DENSERL_CACHE, or beside the Hugging Face caches."""
    from huggingface_hub.constants import HF_HOME

    return Path(os.environ.get(VARIABLE) or Path(HF_HOME) / "denserl").expanduser()


def entries(
    encoding: Encoding, sources: Sequence[Source], *, seed: int, strict: bool, observer: Observer
) -> list[Entry]:
    """The encoded rows of each source, made where they are not there yet.

    The first process of each machine makes them; the others wait. Raises DenserlError when a source
    cannot be read, when there is no room for the rows and, with `strict`, when a row is unusable.
    """

    def make() -> list[tuple[str, str, bool]]:
        common = {
            "kind": encoding.stored.__name__,
            "chat": fingerprint.of_chat(encoding.chat),
            "limits": encoding.limits,
            "code": fingerprint.of_encoding(),
        }
        wanted = [_wanted(source, [seed, place], common) for place, source in enumerate(sources)]
        if strict and not all(one.path.exists() for one in wanted):
            _check_all(encoding, wanted)  # before rows are tokenised for nothing
        return [_placed(encoding, one, observer) for one in wanted]

    places = from_local_main_process(make)
    _check_same([Path(path).name for path, *_ in places])
    found = [_opened(Path(path), name) for path, name, _ in places]
    barrier()
    for path, _, lasting in places:
        if not lasting and is_local_main_process():
            shutil.rmtree(Path(path).parent)  # what is mapped stays
    return found


def _check_same(names: list[str]) -> None:
    """Raise DenserlError unless all processes have the same entries."""
    if any(others != names for others in all_gather_object(names)):
        raise DenserlError(
            "the machines of this job have different data, tokenizers or versions of denserl",
            hint="let them read the same files, and install the same versions",
        )


def _wanted(source: Source, draw: list[int], common: dict[str, Any]) -> _Wanted:
    """The entry of a source. draw: seed of what is drawn from it. common: other settings."""
    opened, limit = open_source(source), source.max_samples
    survey = opened.survey()
    drawn = None if limit is None else [limit, *draw]
    reading = reading_settings(source)
    settings = {"data": survey.identity, "reading": reading, "drawn": drawn, **common}
    rows = survey.rows if limit is None or survey.rows is None else min(limit, survey.rows)
    return _Wanted(source, opened, rows, draw, settings)


def _check_all(encoding: Encoding, wanted: Sequence[_Wanted]) -> None:
    """Raise DenserlError when a row is unusable; names all of them."""
    stats, usable = ReadStats(), 0
    for one in wanted:
        rng = np.random.default_rng(one.draw)
        rows, reader = read_mapped(one.source, one.opened, rng)
        usable += sum(1 for _ in encoding.parse(rows, reader, stats))
    check_read(usable, stats, [one.source for one in wanted], strict=True)


def _placed(encoding: Encoding, wanted: _Wanted, observer: Observer) -> tuple[str, str, bool]:
    """Where an entry is, what its source is called, and whether it lasts."""
    path, name = wanted.path, wanted.opened.name
    try:
        if _state(path) != "whole":
            _made_once(path, encoding, wanted, observer)
        return str(path), name, True
    except OSError as error:
        with suppress(OSError):
            if _state(path) == "whole":  # a job on another machine was faster
                return str(path), name, True
        place = Path(tempfile.mkdtemp(prefix="denserl-")) / path.name
        reason = error.strerror or error
        observer.notice(
            f"the cache {folder()} cannot be written ({reason}): these data are tokenised for this "
            f"start alone, in {place.parent}; another folder can be named in {VARIABLE}"
        )
    try:
        _make(place, encoding, wanted, observer)
    except BaseException as error:
        shutil.rmtree(place.parent, ignore_errors=True)
        if not isinstance(error, OSError):
            raise
        raise DenserlError(
            f"no place for encoded data: {folder()}: {reason}, {place.parent}: "
            f"{error.strerror or error}",
            hint=f"name a folder with room in the environment variable {VARIABLE}",
        ) from error
    return str(place), name, False


def _made_once(path: Path, encoding: Encoding, wanted: _Wanted, observer: Observer) -> None:
    """Make an entry, unless another job does it meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)

    def waiting() -> None:
        sibling = "another machine of this job, or " if several_machines() else ""
        observer.notice(f"{sibling}another job is tokenising the same data; waiting for it")

    # where files cannot be locked, two jobs make it at the same time, each aside
    with locked_in_turn(path.with_name(f".{path.name}.lock"), waiting) as alone:
        state = _state(path)
        if state == "whole":
            return
        if state == "damaged":
            observer.notice(f"the encoded data in {path} are damaged; they are made again")
            shutil.rmtree(path)
        for left in path.parent.glob(f".{path.name}.*.tmp") if alone else ():
            if time.time() - left.stat().st_mtime > _ABANDONED:  # by a job that was killed
                shutil.rmtree(left, ignore_errors=True)
        _make(path, encoding, wanted, observer)


def _state(path: Path) -> str:
    """Whether an entry is whole, damaged or absent."""
    if not path.exists():
        return "absent"
    try:
        record = json.loads((path / RECORD).read_text(encoding="utf-8"))
        whole = record.pop("digest") == _digest(record, path / ROWS)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        whole = False
    return "whole" if whole else "damaged"


def _digest(record: dict[str, Any], rows: Path) -> str:
    return fingerprint.of_settings({**record, "rows": fingerprint.of_file(rows)})


def _make(path: Path, encoding: Encoding, wanted: _Wanted, observer: Observer) -> None:
    """Write an entry aside and rename it into place; one that has come there meanwhile stays."""
    aside = path.with_name(f".{path.name}.{uuid4().hex}.tmp")
    aside.mkdir()
    try:
        record = _write(aside / ROWS, encoding, wanted, observer)
        record["digest"] = _digest(record, aside / ROWS)
        (aside / RECORD).write_text(json.dumps(record), encoding="utf-8")
        sync_folder(aside)
        try:
            aside.rename(path)
        except OSError:
            if not path.exists():
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _write(path: Path, encoding: Encoding, wanted: _Wanted, observer: Observer) -> dict[str, Any]:
    """Encode a source into a file, a few rows at a time; returns what is to be recorded."""
    name, stats = wanted.opened.name, ReadStats()
    rng = np.random.default_rng(wanted.draw)
    usable, failed, batch = 0, [], []
    with (
        ExitStack() as reading,
        path.open("wb") as file,
        pa.ipc.new_file(file, encoding.stored.schema) as out,
    ):

        def watched(rows: Iterator[Row | Skipped]) -> Iterator[Row | Skipped]:
            told = with_progress(rows, observer, "tokenise", wanted.rows)
            return reading.enter_context(closing(told))

        rows, reader = read_mapped(wanted.source, wanted.opened, rng, watched)
        for one in encoding.encode(encoding.parse(rows, reader, stats)):
            if isinstance(one, Skipped):
                failed.append([usable, *_without(name, one)])
            else:
                batch.append(one)
            usable += 1
            if len(batch) == _BATCH:
                out.write_batch(encoding.stored.batch(batch, name))
                batch = []
        if batch:
            out.write_batch(encoding.stored.batch(batch, name))
    remarks = {
        what: [one.count, one.first.removeprefix(name)] for what, one in stats.remarks.items()
    }
    return {
        "usable": usable,
        "failed": failed,
        "skipped": [_without(name, one) for one in stats.skipped],
        "remarks": remarks,
        "random": rng.bit_generator.state if wanted.settings["drawn"] else None,
        "settings": wanted.settings,
    }


def _without(name: str, row: Skipped) -> Skipped:
    """A row whose place does not say where the source lies."""
    return row._replace(origin=row.origin.removeprefix(name))


def _opened(path: Path, name: str) -> Entry:
    """Map an entry into memory. name: of its source."""
    record = json.loads((path / RECORD).read_text(encoding="utf-8"))
    file = pa.ipc.open_file(pa.memory_map(str(path / ROWS)))

    def skipped(origin: str, reason: str, detail: str) -> Skipped:
        return Skipped(name + origin, reason, detail)

    return Entry(
        batches=[Batch(name, file.get_batch(n)) for n in range(file.num_record_batches)],
        usable=record["usable"],
        failed={number: skipped(*row) for number, *row in record["failed"]},
        stats=ReadStats(
            [skipped(*row) for row in record["skipped"]],
            {
                what: Count(count, name + first)
                for what, (count, first) in record["remarks"].items()
            },
        ),
        random=record["random"],
    )
