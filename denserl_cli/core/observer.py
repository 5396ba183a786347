"""What a stage tells people while it works."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, TypeVar

T = TypeVar("T")

CHUNK = 256
"""Rows that are worked on together, and counted together."""
TIMES = (
    *("seconds", "rollout_seconds", "scoring_seconds", "update_seconds"),
    *("tokens_per_second", "responses_per_second"),
)
"""The figures of a step that depend on the clock; all others are the same in every run."""


class Observer:
    """Receives the progress of a stage. This one is silent; the console has those that speak."""

    def begin(self, title: str, total: int | None = None, done: int = 0) -> None:
        """A piece of work of `total` units starts, `done` of which an earlier run has finished."""

    def advance(self, count: int = 1, /, **figures: float) -> None:
        """`count` more units are done; `figures` are the values worth showing beside the bar."""

    def figures(self, step: int, figures: Mapping[str, Any]) -> None:
        """All figures of a step, as metrics.jsonl has them; earlier steps' first on --resume."""

    def sample(self, step: int, sample: Mapping[str, Any]) -> None:
        """A response with its segments' rewards, as samples.jsonl has it."""

    def end(self) -> None:
        """The current piece of work is over."""

    def notice(self, message: str) -> None:
        """Something that the user should know and that does not stop the work."""

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """A result worth a table."""


def with_progress(
    items: Iterable[T], observer: Observer, title: str, total: int | None
) -> Generator[T, None, None]:
    """The same items; the observer hears of each chunk that has gone by."""
    observer.begin(title, total=total)
    source = iter(items)
    try:
        while chunk := list(islice(source, CHUNK)):
            yield from chunk
            observer.advance(len(chunk))
    finally:
        observer.end()


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Put the wall time of what is done meanwhile, on a GPU as well, into `seconds[name]`."""
    import torch

    began = time.perf_counter()
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds[name] = time.perf_counter() - began


def throughput(seconds: float, tokens: int, responses: int) -> dict[str, float]:
    """The figures of speed that every step has.

    tokens: real ones, of prompts and responses.
    """
    return {
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "responses_per_second": responses / seconds,
    }
