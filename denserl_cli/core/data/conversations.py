"""Preference pairs and prompts of data sets, as conversations; rows that are none are counted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from denserl_cli.core.data.row_formats import Turns, UnusableRow, has_tools, pair_of, prompt_of
from denserl_cli.core.data.skipped import Skipped, check_usable
from denserl_cli.core.data.sources import Row, read_source
from denserl_cli.core.errors import DenserlError

if TYPE_CHECKING:
    from denserl_cli.core.recipe.schema import Source

Notice = Callable[[str], None] | None


@dataclass(frozen=True)
class Pair:
    """A preference pair: two message lists with one prompt, each ending in an assistant turn."""

    chosen: Turns
    rejected: Turns
    margin: float | None
    origin: str
    """Where the row came from: file:line, or a data set's name and row number."""
    subset: str | None = None
    """The row's own column `subset`, which benchmarks have."""


@dataclass(frozen=True, eq=False)
class Prompt:
    """A prompt to answer, with the other columns of its row; `ids` come from `encode_prompts`."""

    messages: Turns
    origin: str
    row: dict[str, Any]
    ids: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    truncated: bool = False
    """Whether its beginning was cut off."""


Item = TypeVar("Item", Pair, Prompt)


class PairSet(NamedTuple):
    """The usable pairs, and the rows that are none."""

    pairs: list[Pair]
    skipped: list[Skipped]


class PromptSet(NamedTuple):
    """The usable prompts, and the rows that are none."""

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


@dataclass
class ReadStats:
    """What is to be said about rows that were read."""

    skipped: list[Skipped] = field(default_factory=list)
    guessed: Count = field(default_factory=Count)
    """Pairs whose prompt is what their two texts begin with."""
    with_tools: Count = field(default_factory=Count)

    def add(self, others: ReadStats) -> None:
        """Take over what there is to say about further rows."""
        self.skipped += others.skipped
        self.guessed.add(others.guessed.first, others.guessed.count)
        self.with_tools.add(others.with_tools.first, others.with_tools.count)

    def tell(self, notice: Notice) -> None:
        """Say what a user should know of rows that are used."""
        if notice is None:
            return
        if self.with_tools.count:
            count, first = self.with_tools.count, self.with_tools.first
            notice(f"the tools of {count} rows (the first: {first}) are ignored")
        if self.guessed.count:
            count, first = self.guessed.count, self.guessed.first
            notice(
                f"{count} pairs are texts without a prompt (the first: {first}): what both "
                "texts begin with, up to its last white space, is taken for the prompt"
            )


def read_pairs(
    sources: Sequence[Source], *, seed: int, strict: bool = False, notice: Notice = None
) -> PairSet:
    """Read the preference pairs of a mixture of sources, in the order of the sources.

    notice: told once when prompts had to be guessed, and once when rows bring tools. Raises
    DenserlError when a source cannot be read, when no row is usable and, with `strict`, when one
    row is not.
    """
    return PairSet(*_read(sources, as_pair, seed, strict, notice))


def read_prompts(
    sources: Sequence[Source], *, seed: int, strict: bool = False, notice: Notice = None
) -> PromptSet:
    """Read the prompts of a mixture of sources, in the order of the sources; duplicates stay.

    notice: told once when rows bring tools. Raises DenserlError when a source cannot be read, when
    no row is usable and, with `strict`, when one row is not.
    """
    return PromptSet(*_read(sources, as_prompt, seed, strict, notice))


def _read(
    sources: Sequence[Source],
    parse: Callable[[Row, ReadStats], Item],
    seed: int,
    strict: bool,
    notice: Notice,
) -> tuple[list[Item], list[Skipped]]:
    items: list[Item] = []
    notes = ReadStats()
    for place, source in enumerate(sources):
        rng = np.random.default_rng([seed, place])
        usable = list(parsed(read_source(source, rng), parse, notes))
        items += [usable[i] for i in repeat_rows(len(usable), source.weight, rng)]
    check_read(len(items), notes, sources, strict=strict)
    notes.tell(notice)
    return items, notes.skipped


def parsed(
    rows: Iterable[Row | Skipped], parse: Callable[[Row, ReadStats], Item], notes: ReadStats
) -> Iterator[Item]:
    """Yield what the usable rows hold; the others go into the notes."""
    for row in rows:
        if isinstance(row, Skipped):
            notes.skipped.append(row)
            continue
        try:
            item = parse(row, notes)
        except UnusableRow as error:
            notes.skipped.append(Skipped(row.origin, error.reason, error.detail))
            continue
        if has_tools(row.fields):
            notes.with_tools.add(row.origin)
        yield item


def as_pair(row: Row, notes: ReadStats) -> Pair:
    """The preference pair of a row. Raises UnusableRow."""
    pair = pair_of(row.fields)
    if pair.guessed:
        notes.guessed.add(row.origin)
    subset = row.fields.get("subset")
    named = None if subset is None else str(subset)
    if named is not None and named.encode("utf-8", "replace").decode() != named:
        raise UnusableRow("subset is not Unicode", ascii(named))
    return Pair(pair.chosen, pair.rejected, pair.margin, row.origin, named)


def as_prompt(row: Row, notes: ReadStats) -> Prompt:
    """The prompt of a row. Raises UnusableRow."""
    messages, others = prompt_of(row.fields)
    return Prompt(messages, row.origin, others)


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
