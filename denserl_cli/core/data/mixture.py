"""A mixture of sources as one sequence of encoded rows: who is in, how often, in which order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from denserl_cli.core.data import cache
from denserl_cli.core.data.conversations import ReadStats, check_read, repeat_rows
from denserl_cli.core.data.skipped import Skipped, check_usable

if TYPE_CHECKING:
    from denserl_cli.core.observer import Observer
    from denserl_cli.core.recipe.schema import Source


class Mixture(NamedTuple):
    """Encoded rows in the order of the sources, the skipped rows, and how many were cut."""

    rows: Any
    skipped: list[Skipped]
    truncated: int


def mixed(
    encoding: cache.Encoding,
    sources: Sequence[Source],
    *,
    seed: int,
    strict: bool,
    observer: Observer,
) -> Mixture:
    """Read and encode a mixture of sources, or take what the cache has of them.

    Rows that are used and what is said about them are the same in both cases. Raises DenserlError
    when a source cannot be read, when no row is usable and, with `strict`, when one row is not.
    """
    entries = cache.entries(encoding, sources, seed=seed, strict=strict, observer=observer)
    stats, failed, order = ReadStats(), list[Skipped](), []
    usable = rows = 0
    for place, (source, entry) in enumerate(zip(sources, entries, strict=True)):
        drawn = repeat_rows(entry.usable, source.weight, _generator(entry, [seed, place]))
        encoded = np.ones(entry.usable, bool)
        encoded[list(entry.failed)] = False
        failed += [entry.failed[number] for number in drawn[~encoded[drawn]]]
        order.append(rows + (np.cumsum(encoded) - 1)[drawn[encoded[drawn]]])
        usable, rows = usable + len(drawn), rows + int(encoded.sum())
        stats.add(entry.stats)
    check_read(usable, stats, sources, strict=strict)
    stats.tell(observer.notice)
    batches = [batch for entry in entries for batch in entry.batches]
    found = encoding.stored(batches, np.concatenate([np.empty(0, np.int64), *order]))
    skipped = [*stats.skipped, *failed]
    check_usable(len(found), skipped, strict=strict)
    return Mixture(found, skipped, int(found.numbers("truncated").sum()))


def _generator(entry: cache.Entry, seed: Sequence[int]) -> np.random.Generator:
    """The generator of a source as it is when its rows have been drawn."""
    generator = np.random.default_rng(seed)
    if entry.random is not None:
        generator.bit_generator.state = entry.random
    return generator
