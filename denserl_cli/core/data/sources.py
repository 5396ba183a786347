"""Rows of data sets: files read by ourselves, line by line, everything else through `datasets`.

A row that is no row (broken JSON, not UTF-8, not an object) is reported in its place, so that the
others can be used.
"""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from glob import glob
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from xxhash import xxh3_128

from denserl_cli.core.data.fingerprint import of_file
from denserl_cli.core.data.local_files import (
    ENDINGS,
    Row,
    digest_and_rows,
    is_pattern,
    local_file,
)
from denserl_cli.core.data.skipped import Skipped
from denserl_cli.core.errors import DenserlError

if TYPE_CHECKING:
    from datasets import Dataset

    from denserl_cli.core.recipe.schema import Source


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
    them drawn with a generator. places: how many rows there are, which may take reading them all.
    """

    name: str
    read: Callable[[int | None, np.random.Generator], Iterator[Row | Skipped]]
    survey: Callable[[], Survey]
    places: Callable[[], int]


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
    if source.path == "-":
        return _files([_standard_input()], "stdin", "stdin")
    refuse_address(source.path)
    path = Path(source.path).expanduser()
    if is_pattern(source.path) and not path.exists():
        return _pattern(source)
    file = local_file(path)
    if path.is_file() and file is None:
        raise DenserlError(f"{path}: not a file that is read here", hint=f"convert it; {ENDINGS}")
    if not path.exists() and (file or source.path.startswith((".", "/", "~"))):
        raise DenserlError(f"{path}: no such file or folder", hint="check the path")
    if not path.is_file() or file is None:
        name, dataset = _split(source, _load(source))
        survey = partial(_set_survey, path, dataset)
        return OpenSource(name, partial(_arrow, name, dataset), survey, partial(len, dataset))
    _refuse_splits(source)
    return _files([path], str(path))


def refuse_address(path: str) -> None:
    """Raise DenserlError for the address of something that is not on this machine."""
    scheme, _, rest = path.partition("://")
    if not rest:
        return
    name = rest.rpartition("/")[2] or "rows.jsonl"
    ways = {
        "s3": f"download it first and name the file: aws s3 cp {path} {name}",
        "gs": f"download it first and name the file: gcloud storage cp {path} {name}",
        "hf": "name it as a hub data set, such as owner/name",
    }
    curl = f"download it first and name the file: curl -L -o {name} {path}"
    raise DenserlError(f"{path}: addresses are not read here", hint=ways.get(scheme, curl))


def _pattern(source: Source) -> OpenSource:
    """All files that fit a pattern, one after the other by their names."""
    _refuse_splits(source)
    found = sorted(map(Path, glob(str(Path(source.path).expanduser()), recursive=True)))
    files = [path for path in found if path.is_file()]
    if not files:
        raise DenserlError(f"{source.path}: no file fits", hint="check the pattern")
    for path in files:
        if local_file(path) is None:
            raise DenserlError(f"{path}: not a file that is read here", hint=ENDINGS)
    folder = os.path.join(os.path.commonpath([path.parent for path in files]), "")
    return _files(files, folder)


def _refuse_splits(source: Source) -> None:
    if source.subset or source.split not in (None, "train"):
        raise DenserlError(
            f"{source.path}: a file has no splits or subsets", hint="remove `split` and `subset`"
        )


def _files(paths: Sequence[Path], name: str, shown: str | None = None) -> OpenSource:
    """Files as one source. shown: what the one file is called instead of its path."""
    files = [file for file in (local_file(path, shown) for path in paths) if file]

    def read(limit: int | None, rng: np.random.Generator) -> Iterator[Row | Skipped]:
        if limit is None:
            for file in files:
                yield from file.read(None)
            return
        places = [file.places() for file in files]
        drawn = np.asarray(_drawn(sum(places), limit, rng))
        for file, start, size in zip(files, np.cumsum([0, *places]), places, strict=False):
            here = drawn[(drawn >= start) & (drawn < start + size)] - start
            yield from file.read(here.tolist())

    def survey() -> Survey:
        found = [digest_and_rows(path) for path in paths]
        rows = [rows for _, rows in found if rows is not None]
        if len(found) == 1:
            return Survey(found[0][0], found[0][1])
        content = xxh3_128("".join(digest for digest, _ in found).encode())
        return Survey(content.hexdigest(), sum(rows) if len(rows) == len(found) else None)

    return OpenSource(name, read, survey, lambda: sum(file.places() for file in files))


@cache
def _standard_input() -> Path:
    """What is piped in, kept in a file for as long as this process lives."""
    if sys.stdin is None or sys.stdin.isatty():
        raise DenserlError("nothing is piped in for the source -", hint="pipe JSON Lines into it")
    handle, name = tempfile.mkstemp(prefix="denserl-stdin-", suffix=".jsonl")
    atexit.register(lambda: Path(name).unlink(missing_ok=True))
    with os.fdopen(handle, "wb") as file:
        shutil.copyfileobj(sys.stdin.buffer, file)
    return Path(name)


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
    return f"check path and subset; {ENDINGS}"


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
