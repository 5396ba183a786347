"""What the files of a recipe's sources say before anything is started: how many rows, and which."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from denserl_cli.core.data.column_paths import has_every
from denserl_cli.core.data.comparisons import paths_of
from denserl_cli.core.data.conversations import Parse, ReadStats, as_prompts, parsed
from denserl_cli.core.data.kinds import all_steps, parser_of
from denserl_cli.core.data.local_files import is_pattern
from denserl_cli.core.data.row_readers import read_mapped
from denserl_cli.core.data.skipped import skipped_report
from denserl_cli.core.data.sources import open_source
from denserl_cli.core.errors import DenserlError
from denserl_cli.core.recipe.data_formats import RowMapping, row_mappings

if TYPE_CHECKING:
    from denserl_cli.core.recipe.schema import Recipe, Source

FIRST = 200
"""Rows of each source that are looked at."""


def count_local_rows(sources: Sequence[Source]) -> int | None:
    """The rows of sources in one epoch, one pair or prompt each.

    None where a source is no local file, or where the number of its pairs is not that of its rows.

    Raises:
        DenserlError: a file cannot be read.
    """
    total = 0.0
    for source in sources:
        if not _is_local(source) or not all(map(_one_pair_a_row, row_mappings(source))):
            return None
        rows = open_source(source).places()
        if source.max_samples is not None:
            rows = min(rows, source.max_samples)
        total += rows * source.weight
    return round(total)


def first_rows_problems(recipe: Recipe) -> Iterator[str]:
    """Yield what is wrong with the first rows of the recipe's local sources.

    A source is wrong when it cannot be read, or when none of these rows can be used. Sources are
    wrong together when some have pairs and some have steps.
    """
    wrong = False
    for name in ("preferences", "evaluation", "prompts"):
        for place, source in enumerate(getattr(recipe.data, name)):
            if _is_local(source):
                try:
                    problem = _problem(source, prompts_only=name == "prompts")
                except DenserlError as error:
                    problem = f"{error.message}; {error.hint}" if error.hint else error.message
                if problem:
                    wrong = True
                    yield f"data.{name}[{place}]: {problem}"
    preferences = (*recipe.data.preferences, *recipe.data.evaluation)
    if wrong:
        return
    try:
        all_steps([source for source in preferences if _is_local(source)])
    except DenserlError as error:
        yield f"{error.message}; {error.hint}"


def _problem(source: Source, *, prompts_only: bool) -> str | None:
    stats = ReadStats()
    rng = np.random.default_rng(0)
    rows, reader = read_mapped(source, open_source(source), rng, lambda all_: islice(all_, FIRST))
    parse: Parse = as_prompts if prompts_only else parser_of(source)
    usable = sum(1 for _ in parsed(rows, reader, parse, stats))
    if usable:
        return None
    found = "; ".join(skipped_report(stats.skipped))
    return f"none of the first rows of {source.path} can be used: {found or 'there are none'}"


def _is_local(source: Source) -> bool:
    path = Path(source.path).expanduser()
    return path.exists() or is_pattern(source.path)


def _one_pair_a_row(mapping: RowMapping) -> bool:
    columns = mapping.columns
    named = () if columns is None else (columns.chosen, columns.rejected, columns.answers)
    lists = any(has_every(path) for value in named for path in paths_of(value))
    several = mapping.reader in ("message-trees", "step-labels")
    return not (lists or several or mapping.reads_whole_source) and mapping.ties == "skip"
