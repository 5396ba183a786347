"""Preference pairs and prompts of data sets, as conversations; unusable rows are counted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from denserl_cli.core.data.local_files import Row
from denserl_cli.core.data.messages import (
    ANSWER_AWAITED,
    LIST_AS_TEXT,
    MESSAGES_AS_TEXT,
    SEVERAL_TURNS,
    THOUGHTS_LEFT_OUT,
    Turns,
)
from denserl_cli.core.data.row_formats import (
    ANSWER_HAS_PROMPT,
    NO_SYSTEM_COLUMN,
    UNREAD,
    RowReader,
    has_tools,
)
from denserl_cli.core.data.row_readers import read_mapped
from denserl_cli.core.data.skipped import Skipped, check_usable
from denserl_cli.core.data.sources import open_source
from denserl_cli.core.data.steps import SEPARATOR, Steps, read_steps
from denserl_cli.core.data.unusable import UnusableRow
from denserl_cli.core.errors import DenserlError

if TYPE_CHECKING:
    from denserl_cli.core.recipe.schema import Source

Notice = Callable[[str], None] | None


@dataclass(frozen=True)
class Pair:
    """A preference pair: two message lists with one prompt, each ending in an assistant turn.

    A ranking of more answers has the best one chosen, the worst one rejected.
    """

    chosen: Turns
    rejected: Turns
    margin: float | None
    origin: str
    """Where the row came from: file:line, or a data set's name and row number."""
    subset: str | None = None
    """The row's own column `subset`, which benchmarks have."""
    others: tuple[Turns, ...] = ()
    """Message lists of the answers in between, the better first."""


@dataclass(frozen=True, eq=False)
class Prompt:
    """A prompt to answer, with the other columns of its row; `ids` come from `encode_prompts`."""

    messages: Turns
    origin: str
    row: dict[str, Any]
    ids: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    truncated: bool = False
    """Whether its beginning was cut off."""


Item = TypeVar("Item", Pair, Prompt, Steps)
Parse = Callable[[Row, RowReader], list[Item]]


class PairSet(NamedTuple):
    """The usable pairs, and the rows that give none."""

    pairs: list[Pair]
    skipped: list[Skipped]


class PromptSet(NamedTuple):
    """The usable prompts, and the rows that have none."""

    prompts: list[Prompt]
    skipped: list[Skipped]


@dataclass
class Count:
    """How many rows something is to be said of, and where the first of them is."""

    count: int = 0
    first: str = ""

    def add(self, origin: str, count: int = 1) -> None:
        """Count rows; origin: of the first of them."""
        self.first = self.first if self.count else origin
        self.count += count


_TOOLS = "tools"
_NOTICES = {
    _TOOLS: "the tools of {rows} are ignored",
    MESSAGES_AS_TEXT: "{rows} have messages written as text, JSON or Python; they are read as such",
    ANSWER_AWAITED: "the prompts of {rows} end like a transcript, such as `Assistant:`; all of "
    "their text is taken for one user turn",
    SEVERAL_TURNS: "texts of {rows} read like a transcript of several turns, and not all of these "
    "begin with `Human:` or `Assistant:` after a blank line: the text is taken for one turn; "
    "`roles` names other speakers",
    LIST_AS_TEXT: "{rows} have a list of texts written as one text, which stays as it is; a path "
    "in `columns`, such as chosen[0], reads JSON",
    THOUGHTS_LEFT_OUT: "messages of {rows} have thoughts beside their content, such as "
    "reasoning_content, which are left out",
    ANSWER_HAS_PROMPT: "both answers of {rows} begin with their whole prompt, which stays in them; "
    "if they are whole texts, set format: shared-beginning",
}
"""What is said about rows that are used."""


@dataclass
class ReadStats:
    """What is to be said about rows that were read.

    remarks: about rows that are used, by what is to be said.
    """

    skipped: list[Skipped] = field(default_factory=list)
    remarks: dict[str, Count] = field(default_factory=dict)

    def remark(self, what: str, origin: str, count: int = 1) -> None:
        """Count rows of which something is to be said; origin: of the first of them."""
        self.remarks.setdefault(what, Count()).add(origin, count)

    def add(self, others: ReadStats) -> None:
        """Take over what there is to say about further rows."""
        self.skipped += others.skipped
        for what, one in others.remarks.items():
            self.remark(what, one.first, one.count)

    def told(self) -> list[str]:
        """What a user should know of rows that are used."""
        return [_said(what, self.remarks[what]) for what in sorted(self.remarks)]

    def tell(self, notice: Notice) -> None:
        """Say what a user should know of rows that are used."""
        if notice is not None:
            for line in self.told():
                notice(line)


def _said(what: str, rows: Count) -> str:
    """A remark in words."""
    named = f"{rows.count} rows (the first: {rows.first})"
    if what.startswith(UNREAD):
        column = what.removeprefix(UNREAD)
        return f"column {column} of {named} is not part of the prompt; `columns` can name it"
    if what.startswith(NO_SYSTEM_COLUMN):
        column = what.removeprefix(NO_SYSTEM_COLUMN)
        return f"{named} have no column {column}, which columns.system names"
    return _NOTICES[what].format(rows=named)


def read_pairs(
    sources: Sequence[Source], *, seed: int, strict: bool = False, notice: Notice = None
) -> PairSet:
    """Read the preference pairs of a mixture of sources, in the order of the sources.

    notice: told once about each peculiarity of rows that are used. Raises DenserlError when a
    source cannot be read, when no row is usable and, with `strict`, when one row is not.
    """
    return PairSet(*_read(sources, as_pairs, seed, strict, notice))


def read_prompts(
    sources: Sequence[Source], *, seed: int, strict: bool = False, notice: Notice = None
) -> PromptSet:
    """Read the prompts of a mixture of sources, in the order of the sources; duplicates stay.

    notice: told once about each peculiarity of rows that are used. Raises DenserlError when a
    source cannot be read, when no row is usable and, with `strict`, when one row is not.
    """
    return PromptSet(*_read(sources, as_prompts, seed, strict, notice))


def _read(
    sources: Sequence[Source], parse: Parse[Item], seed: int, strict: bool, notice: Notice
) -> tuple[list[Item], list[Skipped]]:
    items: list[Item] = []
    stats = ReadStats()
    for place, source in enumerate(sources):
        rng = np.random.default_rng([seed, place])
        rows, reader = read_mapped(source, open_source(source), rng)
        usable = list(parsed(rows, reader, parse, stats))
        items += [usable[i] for i in repeat_rows(len(usable), source.weight, rng)]
    check_read(len(items), stats, sources, strict=strict)
    stats.tell(notice)
    return items, stats.skipped


def parsed(
    rows: Iterable[Row | Skipped], reader: RowReader, parse: Parse[Item], stats: ReadStats
) -> Iterator[Item]:
    """Yield what the usable rows hold; the others go into the statistics."""
    for found in rows:
        if isinstance(found, Skipped):
            stats.skipped.append(found)
            continue
        row: Row = found
        reader.remarks.clear()
        try:
            items = parse(row, reader)
        except UnusableRow as error:
            stats.skipped.append(Skipped(row.origin, error.reason, error.detail))
            continue
        for what in (*reader.remarks, *([_TOOLS] if has_tools(row.fields) else [])):
            stats.remark(what, row.origin)
        yield from items


def as_pairs(row: Row, reader: RowReader) -> list[Pair]:
    """The preference pairs of a row. Raises UnusableRow."""
    subset = row.fields.get("subset")
    named = None if subset is None else str(subset)
    if named is not None and named.encode("utf-8", "replace").decode() != named:
        raise UnusableRow("subset is not Unicode", ascii(named))
    return [
        Pair(chosen, rejected, margin, row.origin, named, others)
        for chosen, rejected, margin, others in reader.pairs(row.fields)
    ]


def as_steps(row: Row, reader: RowReader) -> list[Steps]:
    """The labelled steps of a row. Raises UnusableRow."""
    prompt, steps, labels = read_steps(row.fields, reader)
    answer = {"role": "assistant", "content": SEPARATOR.join(steps)}
    return [Steps([*prompt, answer], tuple(steps), tuple(labels), row.origin)]


def as_prompts(row: Row, reader: RowReader) -> list[Prompt]:
    """The prompt of a row. Raises UnusableRow."""
    messages, others = reader.prompt(row.fields)
    return [Prompt(messages, row.origin, others)]


def check_read(usable: int, notes: ReadStats, sources: Sequence[Source], *, strict: bool) -> None:
    """Raise DenserlError when no row is usable, or when `strict` and one row is not."""
    if not usable and not notes.skipped:
        raise DenserlError(f"no rows in {', '.join(s.path for s in sources)}", hint="name others")
    check_usable(usable, notes.skipped, strict=strict)


def repeat_rows(count: int, weight: float, rng: np.random.Generator) -> np.ndarray:
    """Row numbers in `weight` passes: all of them for each whole pass, a random part for the rest.

    2.5 gives every row twice and half of them once more.
    """
    whole = int(weight)
    part = rng.choice(count, size=round((weight - whole) * count), replace=False)
    return np.concatenate([np.tile(np.arange(count), whole), np.sort(part)])
