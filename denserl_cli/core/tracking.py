"""What a stage tells people while it works."""

from __future__ import annotations

from collections.abc import Sequence


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
