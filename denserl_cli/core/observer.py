"""Progress, metrics and notices of a stage, and who is told of them."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, TypeVar

T = TypeVar("T")

CHUNK = 256
"""Items between two reports of progress."""
TIMES = (
    *("seconds", "rollout_seconds", "scoring_seconds", "update_seconds"),
    *("tokens_per_second", "responses_per_second"),
)
"""The metrics of a step that depend on the clock; all others are the same in every run."""


class Observer:
    """Receives the progress of a stage. This one is silent; `denserl_cli.terminal` has others."""

    def begin(self, title: str, total: int | None = None, done: int = 0) -> None:
        """A piece of work starts; it may be a part of the current one.

        Args:
            title: its name for people.
            total: its units; None where their number is unknown.
            done: units that an earlier run has finished.
        """

    def advance(self, count: int = 1, /, **metrics: float) -> None:
        """`count` more units are done; `metrics` are the values worth showing beside the bar."""

    def metrics(self, step: int, metrics: Mapping[str, Any]) -> None:
        """All metrics of a step, as in metrics.jsonl; after --resume, earlier steps come first."""

    def sample(self, step: int, sample: Mapping[str, Any]) -> None:
        """A response with its segments' rewards, as in samples.jsonl."""

    def end(self) -> None:
        """The current piece of work is over."""

    def notice(self, message: str) -> None:
        """Something that the user should know and that does not stop the work."""

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """A result to be shown as a table."""


def with_progress(
    items: Iterable[T], observer: Observer, title: str, total: int | None
) -> Generator[T, None, None]:
    """Yield items and report progress every `CHUNK` of them.

    Args:
        items: what to yield.
        observer: is told the progress.
        title: of this piece of work.
        total: number of items; None where it is unknown.
    """
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
    """Write a block's wall time to `seconds[name]`, work that it queued on the GPU included."""
    import torch

    began = time.perf_counter()
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds[name] = time.perf_counter() - began


def throughput(seconds: float, tokens: int, responses: int) -> dict[str, float]:
    """The speed metrics that every step has.

    Args:
        seconds: wall time of the step.
        tokens: of prompts and responses, without padding.
        responses: their number.
    """
    return {
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "responses_per_second": responses / seconds,
    }
