"""What a stage tells people while it works."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TypeVar

T = TypeVar("T")

CHUNK = 256
"""Rows that are worked on together, and counted together."""


class Observer:
    """Receives the progress of a stage. This one is silent; `console.py` has those that speak."""

    def begin(self, title: str, total: int | None = None, done: int = 0) -> None:
        """A piece of work of `total` units starts, `done` of which an earlier run has finished."""

    def advance(self, count: int = 1, /, **figures: float) -> None:
        """`count` more units are done; `figures` are the values worth showing beside the bar."""

    def end(self) -> None:
        """The current piece of work is over."""

    def notice(self, message: str) -> None:
        """Something that the user should know and that does not stop the work."""

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """A result worth a table."""


def with_progress(
    items: Iterable[T], observer: Observer, title: str, total: int | None
) -> Iterator[T]:
    """The same items; the observer hears of each chunk that has gone by."""
    observer.begin(title, total=total)
    source = iter(items)
    while chunk := list(islice(source, CHUNK)):
        yield from chunk
        observer.advance(len(chunk))
    observer.end()
