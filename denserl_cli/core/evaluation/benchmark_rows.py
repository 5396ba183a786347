"""Rows of the benchmarks for reward models: one prompt with its correct and its wrong answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from denserl_cli.core.data.row_formats import UnusableRow
from denserl_cli.core.data.skipped import Skipped
from denserl_cli.core.data.sources import Row
from denserl_cli.core.errors import DenserlError, refuse

if TYPE_CHECKING:
    from denserl_cli.core.reward_model.metrics import Floats

Fields = Mapping[str, Any]


@dataclass(frozen=True)
class BenchmarkRow:
    """One row of a benchmark.

    part: the subset, domain or source that the row belongs to. id: what else the metrics tell it
    by; empty where there is nothing.
    """

    prompt: str
    correct: tuple[str, ...]
    wrong: tuple[str, ...]
    part: str
    id: str
    origin: str

    @property
    def answers(self) -> tuple[str, ...]:
        """All answers, the correct ones first."""
        return self.correct + self.wrong


@dataclass(frozen=True, eq=False)
class ScoredRow:
    """The scores of a row's correct (C,) and wrong (W,) answers; part and id as in the row."""

    part: str
    id: str
    correct: Floats
    wrong: Floats


@dataclass(frozen=True)
class BenchmarkFormat:
    """What a benchmark's rows look like."""

    name: str
    columns: tuple[str, ...]
    """Columns that are read."""
    parse: Callable[[Fields, str], BenchmarkRow]
    """(columns, origin) to a row. Raises UnusableRow."""
    unique_ids: bool = False
    """Whether an id, other than an empty one, that comes twice is an error."""


@dataclass(frozen=True)
class RankedBenchmark:
    """A benchmark that compares several answers to each prompt, and its official metrics."""

    format: BenchmarkFormat
    metrics: Callable[[Sequence[ScoredRow]], dict[str, Any]]
    """`score` (the official one; None where a part of the benchmark is absent), further totals,
    `parts` (one table), and `incomplete`: what keeps the score from being the official one."""


def text(fields: Fields, name: str) -> str:
    """A column that holds a text. Raises UnusableRow."""
    return _checked(name, fields.get(name))


def texts(fields: Fields, name: str, count: int | None = None) -> tuple[str, ...]:
    """A column that holds a list of texts, `count` of them or at least one. Raises UnusableRow."""
    value = fields.get(name)
    if not isinstance(value, list):
        raise UnusableRow(f"{name} is {_kind(value)}, not a list of texts")
    if not value or len(value) != (count or len(value)):
        raise UnusableRow(f"{name} holds {len(value)} texts, not {count or 'one or more'}")
    return tuple(_checked(name, one) for one in value)


def one_of(fields: Fields, name: str, known: Iterable[str]) -> str:
    """A column that holds one of some words, as they are written there. Raises UnusableRow."""
    value = text(fields, name)
    for word in known:
        if value.strip().lower() == word.lower():
            return word
    raise UnusableRow(f"{name} is {value[:60]!r}, not one of {', '.join(known)}")


def read_rows(
    rows: Iterable[Row | Skipped], wanted: BenchmarkFormat, others: Iterable[BenchmarkFormat]
) -> list[BenchmarkRow]:
    """The rows of a benchmark's file.

    others: formats that a file may have instead. Raises DenserlError, with all problems at once,
    unless every row is one of this benchmark: its score would not be the official one.
    """
    found: list[BenchmarkRow] = []
    problems: list[str] = []
    for number, row in enumerate(rows):
        if isinstance(row, Skipped):
            problems.append(f"{row.origin}: {row.reason}: {row.detail}")
            continue
        if number == 0:
            check_format(row, wanted, others)
        try:
            found.append(wanted.parse(row.fields, row.origin))
        except UnusableRow as error:
            problems.append(f"{row.origin}: {error.reason}")
    if wanted.unique_ids:
        problems += _repeated(found)
    refuse(problems, f"every row of {wanted.name} counts: name the benchmark's own file")
    return found


def check_format(row: Row, wanted: BenchmarkFormat, others: Iterable[BenchmarkFormat]) -> None:
    """Raise DenserlError when the first row of a file is that of another benchmark, or of none.

    A row with all columns is left to `parse`, unless another benchmark can read it.
    """
    problem = _problem(row, wanted)
    if problem is None:
        return
    hint = f"name a file of {wanted.name} with --data, or leave --benchmark out"
    for other in others:
        if other is not wanted and _problem(row, other) is None:
            hint = f"this looks like {other.name}: pass --benchmark {other.name}"
            break
    else:
        if all(name in row.fields for name in wanted.columns):
            return
    raise DenserlError(
        f"{row.origin}: {problem}: this is not a row of {wanted.name}\n"
        f"columns found: {', '.join(map(str, row.fields)) or 'none'}\n"
        f"columns wanted: {', '.join(wanted.columns)}",
        hint=hint,
    )


def _problem(row: Row, wanted: BenchmarkFormat) -> str | None:
    """What keeps a row from being one of a benchmark."""
    missing = [name for name in wanted.columns if name not in row.fields]
    if missing:
        return f"no column {', '.join(missing)}"
    try:
        wanted.parse(row.fields, row.origin)
    except UnusableRow as error:
        return error.reason
    return None


def _repeated(rows: Iterable[BenchmarkRow]) -> Iterator[str]:
    """What to say of each row whose id another one has already."""
    seen: dict[str, str] = {}
    for row in rows:
        if row.id and row.id in seen:
            yield f"{row.origin}: the same id as {seen[row.id]}: {row.id[:60]!r}"
        seen.setdefault(row.id, row.origin)


def _checked(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise UnusableRow(f"{name} is {_kind(value)}, not text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UnusableRow(f"{name} is not Unicode text: {error}") from error
    return value


def _kind(value: object) -> str:
    return "empty" if value is None else type(value).__name__
