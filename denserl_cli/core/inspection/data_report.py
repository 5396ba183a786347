"""What a source of data holds and what becomes of its rows, before any model is loaded."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from denserl_cli.core.chat.loading import load_chat
from denserl_cli.core.data.kinds import has_steps
from denserl_cli.core.data.local_files import Row
from denserl_cli.core.data.skipped import Skipped, skipped_report
from denserl_cli.core.data.sources import open_source
from denserl_cli.core.data.unread_columns import fitting_formats
from denserl_cli.core.errors import DenserlError
from denserl_cli.core.inspection.data_tally import (
    Column,
    Example,
    Kind,
    Lengths,
    Limits,
    Reading,
    RowTally,
    item_key,
    prompt_of,
    summary,
)
from denserl_cli.core.recipe.data_formats import mapping_settings, row_mappings

if TYPE_CHECKING:
    from denserl_cli.core.chat.format import ChatFormat
    from denserl_cli.core.recipe.schema import DataFormat, Recipe, Source

_CHUNK = 256
_TRIED = 200
"""Rows by which a layout is recognised."""


@dataclass
class DataReport:
    """What a source holds and what becomes of its rows."""

    source: str
    kind: str
    """pairs, responses in labelled steps, or prompts."""
    rows: int
    columns: dict[str, Column]
    format: str | None
    """The known format by which the rows are read."""
    recognized: bool
    """Whether the format was found here and is not the source's own."""
    mapping: dict[str, Any]
    """What the source would say to be read in this way."""
    usable: int
    skipped: list[Skipped]
    remarks: list[str]
    unit: str
    """characters, or tokens."""
    lengths: dict[str, Lengths]
    cut: int | None
    """How many are cut to the limits; None without a tokenizer."""
    prompts: int
    """Different prompts."""
    duplicates: int
    """Pairs or prompts that come again."""
    shared_prompts: int | None
    """Different prompts that also are among the evaluation's; None where there is none."""
    longer_is_better: float | None
    """Share of the pairs of unequal length whose better answer is the longer one."""
    example: Example | None

    def document(self) -> dict[str, Any]:
        """The report as JSON can hold it; skipped rows counted by reason."""
        skipped: dict[str, dict[str, Any]] = {}
        for row in self.skipped:
            entry = {"rows": 0, "first": row.origin, "detail": row.detail}
            skipped.setdefault(row.reason, entry)["rows"] += 1
        lengths = {name: one._asdict() for name, one in self.lengths.items()}
        return {**asdict(self), "skipped": skipped, "lengths": lengths}


def report_sources(
    recipe: Recipe | None, source: Source | None, *, prompts_only: bool = False
) -> Iterator[DataReport]:
    """Report on a source, or on all of a recipe's.

    Args:
        recipe: gives tokenizer and limits; None: without.
        source: the source; None: those of the recipe, each in turn.
        prompts_only: whether the source holds prompts for train-ppo.

    Raises:
        DenserlError: there is nothing to look at, or a source or the tokenizer cannot be read.
    """
    if recipe is None:
        assert source is not None
        yield report_on(source, prompts_only=prompts_only)
        return
    data = recipe.data
    sources = (
        [(source, prompts_only)]
        if source
        else [
            *((one, False) for one in (*data.preferences, *data.evaluation)),
            *((one, True) for one in data.prompts),
        ]
    )
    if not sources:
        hint = "name data: denserl data PATH --recipe ..."
        raise DenserlError(f"recipe {recipe.name} names no data of its own", hint=hint)
    chat = load_chat(recipe)[1] if recipe.model.path or recipe.model.tokenizer else None
    limits = Limits(data.max_length, data.max_prompt_length, recipe.ppo.max_prompt_length)
    held = prompt_keys(data.evaluation) if data.evaluation else None
    for one, alone in sources:
        compared = None if one in data.evaluation else held
        yield report_on(one, chat=chat, limits=limits, prompts_only=alone, evaluation=compared)


def report_on(
    source: Source,
    *,
    chat: ChatFormat | None = None,
    limits: Limits | None = None,
    prompts_only: bool = False,
    evaluation: Collection[int] | None = None,
) -> DataReport:
    """Read a source as training would, and describe it.

    Args:
        source: the source; where its rows cannot be read and look like a known format, that is
            taken.
        chat: how conversations become ids; None: lengths are in characters.
        limits: the recipe's, with `chat`.
        prompts_only: whether it holds prompts for train-ppo.
        evaluation: keys of the evaluation's prompts, from `prompt_keys`.

    Raises:
        DenserlError: the source as a whole cannot be read.
    """
    asked = prompts_only
    taken, prompts_only = _recognized(source, prompts_only)
    remarks = [] if asked or not prompts_only else _why_no_pairs(taken)
    reading = Reading(taken, prompts_only)
    kind: Kind = "prompts" if prompts_only else "steps" if has_steps(taken) else "pairs"
    tally = RowTally(chat, limits, kind)
    items = reading.items()
    while chunk := list(islice(items, _CHUNK)):
        tally.add(chunk)
    skipped = [*reading.stats.skipped, *tally.failed]
    shared = None if evaluation is None else len(tally.prompt_keys & set(evaluation))
    return DataReport(
        source=source.path,
        kind="responses in labelled steps" if kind == "steps" else kind,
        rows=reading.rows,
        columns=reading.columns,
        format=taken.format,
        recognized=taken.format != source.format,
        mapping=mapping_settings(reading.mapping or row_mappings(taken)[0]),
        usable=tally.usable,
        skipped=skipped,
        remarks=[*remarks, *reading.stats.told()],
        unit="characters" if chat is None else "tokens",
        lengths={name: summary(values) for name, values in tally.lengths.items() if values},
        cut=None if chat is None else tally.cut,
        prompts=len(tally.prompt_keys),
        duplicates=tally.duplicates,
        shared_prompts=shared,
        longer_is_better=tally.longer_share(),
        example=tally.example,
    )


def prompt_keys(sources: Sequence[Source]) -> set[int]:
    """What tells apart the prompts of sources of preference pairs.

    Raises:
        DenserlError: a source as a whole cannot be read.
    """
    return {
        item_key(prompt_of(item)) for source in sources for item in Reading(source, False).items()
    }


def _recognized(source: Source, prompts_only: bool) -> tuple[Source, bool]:
    """The source as its first rows can be read, and whether they are prompts alone."""
    if prompts_only or _usable(source, False):
        return source, prompts_only
    if source.format is None and source.columns is None:
        for name in _formats(source):
            if _usable(replace(source, format=name), False):
                return replace(source, format=name), False
    return source, _usable(source, True)


def _usable(source: Source, prompts_only: bool) -> bool:
    """Whether one of the first rows is."""
    whole = replace(source, max_samples=None)
    return next(Reading(whole, prompts_only, _TRIED).items(), None) is not None


def _why_no_pairs(source: Source) -> list[str]:
    reading = Reading(source, False, _TRIED)
    for _ in reading.items():
        pass
    lines = skipped_report(reading.stats.skipped)
    return [f"read as prompts, for no row gives a pair: {line}" for line in lines]


def _formats(source: Source) -> list[DataFormat]:
    rows = open_source(source).read(None, np.random.default_rng(0))
    first = next((row for row in islice(rows, _TRIED) if isinstance(row, Row)), None)
    return fitting_formats(first.fields) if first else []
