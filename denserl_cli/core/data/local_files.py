"""Files of rows that are read by ourselves: JSON Lines, JSON, CSV and parquet, also compressed."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from xxhash import xxh3_128

from denserl_cli.core.data.json_stream import is_json_lines, json_elements, json_errors
from denserl_cli.core.data.skipped import Skipped
from denserl_cli.core.errors import DenserlError

T = TypeVar("T")

COMPRESSED = (".gz", ".zst", ".bz2")
ENDINGS = "files end in .jsonl, .json, .csv, .tsv or .parquet, the texts also in .gz, .zst or .bz2"
_BATCH = 256
"""Rows that are read from a parquet file at a time."""
_BLOCK = 2**20
_UTF16 = (b"\xff\xfe", b"\xfe\xff")


class Row(NamedTuple):
    """One row and where it is: file:line, or a name with the row's number from 0."""

    origin: str
    fields: dict[str, Any]


class LocalFile(NamedTuple):
    """A file of rows.

    places: how many places for a row it has, which may take reading it. read: the rows at some
    places, ascending from 0; None: all.
    """

    path: Path
    places: Callable[[], int]
    read: Callable[[Iterable[int] | None], Iterator[Row | Skipped]]


def local_file(path: Path, name: str | None = None) -> LocalFile | None:
    """A file by its ending; None for an ending that no reader has.

    name: with which the origins of its rows begin; None: the path.
    """
    kind = path.with_suffix("").suffix if path.suffix in COMPRESSED else path.suffix
    kinds: dict[str, tuple[Callable[..., int], Callable[..., Iterator[Row | Skipped]]]] = {
        ".jsonl": (_line_count, _jsonl),
        ".ndjson": (_line_count, _jsonl),
        ".json": (_element_count, _json),
        ".csv": (_record_count, _csv),
        ".tsv": (_record_count, _csv),
    }
    if path.suffix == ".parquet":
        kinds[".parquet"] = (_parquet_count, _parquet)
    if kind not in kinds:
        return None
    places, read = kinds[kind]

    def counted() -> int:
        with _readable(path):
            return places(path)

    def rows(wanted: Iterable[int] | None) -> Iterator[Row | Skipped]:
        with _readable(path):
            yield from read(path, name or str(path), wanted)

    return LocalFile(path, counted, rows)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        _refuse_utf16(path)
        yield
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        hint = "compress it again, or copy it again"
        raise DenserlError(f"{path}: damaged or cut off: {error}", hint=hint) from error
    except OSError as error:
        raise DenserlError(f"{path}: {error.strerror or error}", hint="check the file") from error


def _refuse_utf16(path: Path) -> None:
    """Raise DenserlError for a text in UTF-16, which would be one broken line after the other."""
    if path.suffix == ".parquet":
        return
    with open_data(path) as file:
        start = file.read(64)
    zeros = start[1::2].count(0), start[::2].count(0)
    if start.startswith(_UTF16) or (len(start) > 3 and max(zeros) > len(start) // 4):
        new = f"iconv -f UTF-16 -t UTF-8 {path.name} > utf8-{path.name}"
        raise DenserlError(f"{path}: is UTF-16, not UTF-8", hint=f"save it as UTF-8: {new}")


def open_data(path: Path) -> Any:
    """Open a file to read bytes, uncompressed as its ending says."""
    if path.suffix == ".gz":
        return gzip.open(path, "rb")
    if path.suffix in COMPRESSED:
        import pyarrow as pa

        return io.BufferedReader(
            pa.input_stream(path, compression=path.suffix[1:].replace("zst", "zstd"))
        )
    return path.open("rb")


def digest_and_rows(path: Path) -> tuple[str, int | None]:
    """A digest of a file's content, and about how many rows it has where that is quickly known."""
    content, lines, end = xxh3_128(path.suffix.encode()), 0, b"\n"
    with _readable(path):
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                content.update(block)
                lines, end = lines + block.count(b"\n"), block[-1:]
        rows = lines + (end != b"\n") if path.suffix in (".jsonl", ".ndjson") else None
        if path.suffix in COMPRESSED and path.with_suffix("").suffix in (".jsonl", ".ndjson"):
            rows = _line_count(path)
        if path.suffix == ".parquet":
            rows = _parquet_count(path)
    return content.hexdigest(), rows


def read_lines(
    name: str, lines: Iterable[bytes], wanted: Iterable[int] | None = None
) -> Iterator[Row | Skipped]:
    """Yield the rows of JSON Lines, blank lines left out.

    wanted: places of the lines to read, ascending from 0; default: all.
    """
    for place, line in _picked(lines, count() if wanted is None else wanted):
        if line.strip():
            yield _parsed(f"{name}:{place + 1}", line)


def _picked(items: Iterable[T], wanted: Iterable[int]) -> Iterator[tuple[int, T]]:
    """The items at some places, ascending from 0, with their places."""
    places = iter(wanted)
    following = next(places, None)
    for place, item in enumerate(items):
        if place == following:
            yield place, item
            following = next(places, None)


def _parsed(origin: str, line: bytes) -> Row | Skipped:
    """One line of JSON Lines."""
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return Skipped(origin, "not UTF-8", str(error))
    except (ValueError, RecursionError) as error:
        return Skipped(origin, "broken JSON", str(error))
    return _checked(origin, value)


def _checked(origin: str, value: object) -> Row | Skipped:
    if isinstance(value, dict):
        return Row(origin, value)
    return Skipped(origin, "not an object", f"a row is {type(value).__name__}")


def _filled_lines(path: Path) -> np.ndarray:
    with open_data(path) as file:
        places = (place for place, line in enumerate(file) if line.strip())
        return np.fromiter(places, np.int64)


def _line_count(path: Path) -> int:
    return len(_filled_lines(path))


def _jsonl(path: Path, name: str, wanted: Iterable[int] | None) -> Iterator[Row | Skipped]:
    if wanted is not None:
        wanted = _filled_lines(path)[np.fromiter(wanted, np.int64)].tolist()
    with open_data(path) as file:
        yield from read_lines(name, file, wanted)


def _element_count(path: Path) -> int:
    with json_errors(path):
        if is_json_lines(path, open_data):
            return _line_count(path)
        return sum(1 for _ in json_elements(path, open_data))


def _json(path: Path, name: str, wanted: Iterable[int] | None) -> Iterator[Row | Skipped]:
    """A list of rows, {"data": [...]}, or JSON Lines under another name."""
    with json_errors(path):
        if is_json_lines(path, open_data):
            yield from _jsonl(path, name, wanted)
            return
        elements = json_elements(path, open_data)
        for place, value in _picked(elements, count() if wanted is None else wanted):
            yield _checked(f"{name}[{place}]", value)


@contextmanager
def _csv_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise DenserlError(f"{path}: not UTF-8: {error}", hint="save it as UTF-8") from error
    except csv.Error as error:
        raise DenserlError(f"{path}: broken CSV: {error}", hint="write it again") from error


@contextmanager
def _records(path: Path) -> Iterator[tuple[list[str], Iterator[tuple[int, list[str]]]]]:
    """The names of the columns, and each record with the line that it begins on."""
    csv.field_size_limit(sys.maxsize)
    tabs = ".tsv" in path.suffixes
    with (
        _csv_errors(path),
        open_data(path) as raw,
        io.TextIOWrapper(raw, encoding="utf-8-sig", newline="") as file,
    ):
        reader = csv.reader(file, delimiter="\t" if tabs else ",")
        header = next(reader, [])
        if len(set(header)) != len(header) or not all(name.strip() for name in header):
            message = f"{path}:1: the names of the columns are {', '.join(map(repr, header))}"
            raise DenserlError(message, hint="give each column a name of its own")

        if len(header) == 1 and (parted := re.search(r"[;\t|]", header[0])):
            message = f"{path}:1: names one column, {header[0]!r}, not parted by commas"
            hint = f"write it with commas in place of {parted[0]!r}, or as .tsv with tabs"
            raise DenserlError(message, hint=hint)

        def records() -> Iterator[tuple[int, list[str]]]:
            line = reader.line_num
            for record in reader:
                if record:
                    yield line + 1, record
                line = reader.line_num

        yield header, records()


def _record_count(path: Path) -> int:
    with _records(path) as (_, records):
        return sum(1 for _ in records)


def _csv(path: Path, name: str, wanted: Iterable[int] | None) -> Iterator[Row | Skipped]:
    """Rows under a line with the names of the columns; all are texts, an empty one is none."""
    with _records(path) as (header, records):
        for _, (line, cells) in _picked(records, count() if wanted is None else wanted):
            origin = f"{name}:{line}"
            if len(cells) != len(header):
                detail = f"found {len(cells)} cells, the first line names {len(header)} columns"
                yield Skipped(origin, "wrong number of cells", detail)
            else:
                values = [cell if cell.strip() else None for cell in cells]
                yield Row(origin, dict(zip(header, values, strict=True)))


def _parquet_count(path: Path) -> int:
    from pyarrow.parquet import ParquetFile

    with _parquet_errors(path):
        return int(ParquetFile(path).metadata.num_rows)


def _parquet(path: Path, name: str, wanted: Iterable[int] | None) -> Iterator[Row | Skipped]:
    from pyarrow.parquet import ParquetFile

    with _parquet_errors(path):
        file = ParquetFile(path)
        chosen = np.full(file.metadata.num_rows, wanted is None)
        if wanted is not None:
            chosen[np.fromiter(wanted, np.int64)] = True
        start = 0
        for batch in file.iter_batches(batch_size=_BATCH):
            places = np.flatnonzero(chosen[start : start + batch.num_rows])
            rows = batch.take(places).to_pylist() if len(places) else []
            for place, fields in zip(places, rows, strict=True):
                yield Row(f"{name}[{start + place}]", fields)
            start += batch.num_rows


@contextmanager
def _parquet_errors(path: Path) -> Iterator[None]:
    from pyarrow import ArrowException

    try:
        yield
    except (ArrowException, UnicodeDecodeError) as error:
        raise DenserlError(
            f"{path}: not a readable parquet file: {error}", hint="write it again"
        ) from error


_GLOB = re.compile(r"[*?\[]")


def is_pattern(path: str) -> bool:
    """Whether a path may stand for several files."""
    return bool(_GLOB.search(path))
