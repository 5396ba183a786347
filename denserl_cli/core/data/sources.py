"""Rows of data sets: files read by ourselves, line by line, everything else through `datasets`.

A row that is no row (broken JSON, not UTF-8, not an object) is reported in its place, so that the
others can be used.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
from xxhash import xxh3_128

from denserl_cli.core.data.fingerprint import of_file
from denserl_cli.core.data.json_stream import is_json_lines, json_elements, json_errors
from denserl_cli.core.data.skipped import Skipped
from denserl_cli.core.errors import DenserlError

if TYPE_CHECKING:
    from datasets import Dataset

    from denserl_cli.core.recipe.schema import Source


T = TypeVar("T")

_BATCH = 256
"""Rows that are read from a parquet file at a time."""
_BLOCK = 2**20


class Row(NamedTuple):
    """One row and where it is: file:line, or a name with the row's number from 0."""

    origin: str
    fields: dict[str, Any]


class Survey(NamedTuple):
    """What can be said of a source before its rows are parsed.

    identity: the same for the same content, wherever it lies. rows: about how many there are, where
    that is known.
    """

    identity: str
    rows: int | None


class OpenSource(NamedTuple):
    """A source that is there.

    name: with which the origins of its rows begin. read: its rows in their order, or a number of
    them drawn with a generator.
    """

    name: str
    read: Callable[[int | None, np.random.Generator], Iterator[Row | Skipped]]
    survey: Callable[[], Survey]


def row_count(source: Source) -> int:
    """About how many rows a source gives in one pass; 0 where that takes parsing them."""
    rows = open_source(source).survey().rows or 0
    return rows if source.max_samples is None else min(rows, source.max_samples)


def read_source(source: Source, rng: np.random.Generator) -> Iterator[Row | Skipped]:
    """Yield the rows of a source in their order, or `max_samples` of them drawn with `rng`.

    Raises DenserlError when the source as a whole cannot be read.
    """
    return open_source(source).read(source.max_samples, rng)


def open_source(source: Source) -> OpenSource:
    """Find a source; files are not opened yet. Raises DenserlError when it is not there."""
    path = Path(source.path).expanduser()
    reader = {".jsonl": _jsonl, ".json": _json, ".parquet": _parquet}.get(path.suffix)
    if path.is_file() and reader is None:
        raise DenserlError(f"{path}: not a .jsonl, .json or .parquet file", hint="convert it")
    if not path.exists() and (reader or source.path.startswith((".", "/", "~"))):
        raise DenserlError(f"{path}: no such file or folder", hint="check the path")
    if not path.is_file() or reader is None:
        name, dataset = _split(source, _load(source))
        return OpenSource(name, partial(_arrow, name, dataset), partial(_set_survey, path, dataset))
    if source.subset or source.split not in (None, "train"):
        raise DenserlError(
            f"{path}: a file has no splits or subsets", hint="remove `split` and `subset`"
        )

    def read(limit: int | None, rng: np.random.Generator) -> Iterator[Row | Skipped]:
        with _readable(path):
            yield from reader(path, limit, rng)

    return OpenSource(str(path), read, partial(_survey, path))


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DenserlError(f"{path}: {error.strerror or error}", hint="check the file") from error


def _set_survey(path: Path, dataset: Dataset) -> Survey:
    """What a data set is known by: its fingerprint, or a digest of what lies in a saved folder.

    A fingerprint says how rows were made, not what they are.
    """
    if not _is_saved(path):
        return Survey(dataset._fingerprint, len(dataset))
    content = xxh3_128()
    for file in dataset.cache_files:
        content.update(of_file(Path(file["filename"])).encode())
    return Survey(content.hexdigest(), len(dataset))


def _is_saved(folder: Path) -> bool:
    """Whether `datasets` has saved a folder."""
    return any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _survey(path: Path) -> Survey:
    """A digest of a file's content, and its rows where they can be counted without parsing."""
    content, lines, end = xxh3_128(path.suffix.encode()), 0, b"\n"
    with _readable(path), path.open("rb") as file:
        while block := file.read(_BLOCK):
            content.update(block)
            lines, end = lines + block.count(b"\n"), block[-1:]
    rows = lines + (end != b"\n") if path.suffix == ".jsonl" else None
    if path.suffix == ".parquet":
        from pyarrow.parquet import ParquetFile

        with _parquet_errors(path):
            rows = ParquetFile(path).metadata.num_rows
    return Survey(content.hexdigest(), rows)


def _jsonl(path: Path, limit: int | None, rng: np.random.Generator) -> Iterator[Row | Skipped]:
    wanted = None
    if limit is not None:
        with path.open("rb") as file:
            places = (place for place, line in enumerate(file) if line.strip())
            filled = np.fromiter(places, np.int64)
        wanted = filled[_drawn(len(filled), limit, rng)]
    with path.open("rb") as file:
        yield from read_lines(str(path), file, wanted)


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


def _json(path: Path, limit: int | None, rng: np.random.Generator) -> Iterator[Row | Skipped]:
    """A list of rows, {"data": [...]}, or JSON Lines under another name."""
    with json_errors(path):
        if is_json_lines(path):
            yield from _jsonl(path, limit, rng)
            return
        wanted: Iterable[int] = count()
        if limit is not None:
            wanted = _drawn(sum(1 for _ in json_elements(path)), limit, rng)
        for place, value in _picked(json_elements(path), wanted):
            yield _checked(f"{path}[{place}]", value)


def _parquet(path: Path, limit: int | None, rng: np.random.Generator) -> Iterator[Row | Skipped]:
    from pyarrow.parquet import ParquetFile

    with _parquet_errors(path):
        file = ParquetFile(path)
        wanted = np.zeros(file.metadata.num_rows, bool)
        wanted[_drawn(len(wanted), limit, rng)] = True
        start = 0
        for batch in file.iter_batches(batch_size=_BATCH):
            places = np.flatnonzero(wanted[start : start + batch.num_rows])
            rows = batch.take(places).to_pylist() if len(places) else []
            for place, fields in zip(places, rows, strict=True):
                yield Row(f"{path}[{start + place}]", fields)
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


def _arrow(
    name: str, dataset: Dataset, limit: int | None, rng: np.random.Generator
) -> Iterator[Row | Skipped]:
    """A folder saved by `datasets`, another folder it understands, or a data set of the hub."""
    places = _drawn(len(dataset), limit, rng)
    rows = dataset.with_format(None)
    for place, fields in zip(places, rows.select(places), strict=True):
        yield Row(f"{name}[{place}]", fields)


def _load(source: Source) -> Dataset | Mapping[str, Dataset]:
    from datasets import load_dataset, load_from_disk
    from datasets.exceptions import DatasetsError

    folder = Path(source.path).expanduser()
    try:
        if _is_saved(folder):
            return load_from_disk(str(folder))
        return load_dataset(str(folder) if folder.is_dir() else source.path, source.subset)
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:
        cause = error.__cause__ if isinstance(error, DatasetsError) else None  # it says more
        hint = _advice(error)
        raise DenserlError(f"cannot read {source.path}: {cause or error}", hint=hint) from error


def _advice(error: Exception) -> str:
    if isinstance(error, ConnectionError):
        return "check the network (data sets read before are kept), or name a file or folder"
    if "gated" in str(error).lower():
        return "accept the data set's terms on its hub page, then run: hf auth login"
    return "check path and subset; files end in .jsonl, .json or .parquet"


def _split(source: Source, loaded: Dataset | Mapping[str, Dataset]) -> tuple[str, Dataset]:
    """The wanted split and its name: `train` or the only one where the source names none."""
    if not isinstance(loaded, Mapping):
        if source.split not in (None, "train"):
            raise DenserlError(f"{source.path} has no splits", hint="remove `split`")
        return source.path, loaded
    names = [str(name) for name in loaded]
    split = source.split or ("train" if "train" in names or len(names) != 1 else names[0])
    if split not in names:
        raise DenserlError(
            f"{source.path} has no split {split}", hint=f"set `split` to one of: {', '.join(names)}"
        )
    return f"{source.path}:{split}", loaded[split]


def _drawn(rows: int, limit: int | None, rng: np.random.Generator) -> range | np.ndarray:
    """Row numbers to read, ascending."""
    if limit is None or limit >= rows:
        return range(rows)
    return np.sort(rng.choice(rows, size=limit, replace=False))
