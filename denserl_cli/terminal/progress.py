"""The progress of a piece of work, and its lines in a log where there is no terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from denserl_cli.core.observer import Observer
from denserl_cli.terminal.console import print_table

_SECONDS_BETWEEN_LINES = 5.0


class Progress:
    """Count and pace of one piece of work, measured from its start."""

    def __init__(self, title: str, total: int | None, done: int) -> None:
        self.title, self.total, self.done = title, total, done
        self.metrics: dict[str, float] = {}
        self._earlier = done
        self._start = time.monotonic()

    def advance(self, count: int, metrics: dict[str, float]) -> None:
        """Count finished units and keep the latest metrics."""
        self.done += count
        self.metrics = {**self.metrics, **metrics}

    @property
    def count(self) -> str:
        """`done/total`, or `done` alone where the total is unknown."""
        return str(self.done) if self.total is None else f"{self.done}/{self.total}"

    @property
    def rate(self) -> str:
        """Units per second or, below one, seconds per unit."""
        per_second = self._per_second()
        if per_second == 0:
            return ""
        return f"{per_second:.1f}/s" if per_second >= 1 else f"{1 / per_second:.1f} s each"

    @property
    def left(self) -> str:
        """Time left at this pace; empty if it is unknown."""
        per_second = self._per_second()
        if self.total is None or per_second == 0:
            return ""
        return f"{clock((self.total - self.done) / per_second)} left"

    @property
    def elapsed(self) -> str:
        """Time since the start."""
        return clock(time.monotonic() - self._start)

    @property
    def latest(self) -> str:
        """The latest metrics."""
        return "  ".join(f"{name} {number(value)}" for name, value in self.metrics.items())

    def _per_second(self) -> float:
        return (self.done - self._earlier) / max(time.monotonic() - self._start, 1e-9)


def number(value: float) -> str:
    """Write a number with four digits, or all digits before the point if there are more."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.4g}"


def clock(seconds: float) -> str:
    """Write a duration as m:ss or h:mm:ss."""
    minutes, rest = divmod(max(round(seconds), 0), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class ConsoleObserver(Observer):
    """What both observers share: nested pieces of work, all ended when the context is left."""

    def __init__(self) -> None:
        self._work: list[Progress] = []

    def __enter__(self) -> ConsoleObserver:
        return self

    def __exit__(self, *_: object) -> None:
        while self._work:
            self.end()

    def begin(self, title: str, total: int | None = None, done: int = 0) -> None:
        """Start a piece of work, inside the current one if there is one."""
        self._work.append(Progress(title, total, done))

    def advance(self, count: int = 1, /, **metrics: float) -> None:
        """Count finished units of the innermost piece of work."""
        self._work[-1].advance(count, metrics)

    def end(self) -> None:
        """Finish the innermost piece of work."""
        self._work.pop()

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Print a result on stdout."""
        print_table(title, columns, rows)


class PlainObserver(ConsoleObserver):
    """Timestamped lines for log files: the first, the last, and one every few seconds between."""

    def __init__(self) -> None:
        super().__init__()
        self._printed = 0.0

    def begin(self, title: str, total: int | None = None, done: int = 0) -> None:
        """Start a piece of work, with a line unless it is inside another."""
        super().begin(title, total, done)
        if len(self._work) == 1:
            self._line()

    def advance(self, count: int = 1, /, **metrics: float) -> None:
        """Count finished units, with a line if the last one was some seconds ago."""
        super().advance(count, **metrics)
        if time.monotonic() - self._printed >= _SECONDS_BETWEEN_LINES:
            self._line()

    def end(self) -> None:
        """Finish the piece of work, with a line unless it is inside another."""
        pace = self._work[-1]
        if len(self._work) == 1:
            self._say(pace.title, pace.count, f"took {pace.elapsed}", pace.rate, pace.latest)
        super().end()

    def notice(self, message: str) -> None:
        """Print the message with its time."""
        self._say(f"note: {message}")

    def _line(self) -> None:
        pace = self._work[-1]
        self._say(pace.title, pace.count, pace.rate, pace.left, pace.latest)
        self._printed = time.monotonic()

    def _say(self, *parts: str) -> None:
        text = "  ".join(part for part in parts if part)
        print(f"{time.strftime('%H:%M:%S')}  {text}", file=sys.stderr, flush=True)


class QuietObserver(PlainObserver):
    """Notes and results; no line about progress."""

    def _line(self) -> None:
        pass

    def end(self) -> None:
        """Finish the piece of work without a word."""
        ConsoleObserver.end(self)
