"""What the sources of a recipe's preferences hold: pairs, or steps with labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from denserl_cli.core.data.column_paths import look_up
from denserl_cli.core.data.conversations import Parse, as_pairs, as_steps
from denserl_cli.core.data.local_files import Row
from denserl_cli.core.data.sources import open_source
from denserl_cli.core.errors import DenserlError

if TYPE_CHECKING:
    from denserl_cli.core.recipe.schema import Source

_COMPARED = ("chosen", "rejected", "answers")


def has_steps(source: Source) -> bool:
    """Whether the rows of a source are steps with labels, by its columns or its first row.

    Raises:
        DenserlError: The source as a whole cannot be read.
    """
    columns = source.columns
    if source.format is not None or source.group_by is not None:
        return False
    if columns is not None:
        if columns.completions is not None or columns.labels is not None:
            return True
        if any(getattr(columns, name) is not None for name in _COMPARED):
            return False
    rows = open_source(source).read(None, np.random.default_rng(0))
    first = next((row.fields for row in rows if isinstance(row, Row)), {})
    if any(first.get(name) is not None for name in _COMPARED):
        return False
    return all(look_up(first, name) is not None for name in ("completions", "labels"))


def parser_of(source: Source) -> Parse:
    """What reads the rows of a source: pairs or labelled steps."""
    return as_steps if has_steps(source) else as_pairs


def all_steps(sources: Sequence[Source]) -> bool:
    """Whether sources hold steps with labels, all of them.

    Raises:
        DenserlError: Some hold steps and some pairs, or a source as a whole cannot be read.
    """
    found = [has_steps(source) for source in sources]
    if len(set(found)) == 2:
        steps, pairs = (sources[found.index(kind)].path for kind in (True, False))
        raise DenserlError(
            f"{steps} has steps with labels and {pairs} has preference pairs: one reward model "
            "learns from one of them",
            hint="name sources of one kind in data.preferences and data.evaluation",
        )
    return any(found)
