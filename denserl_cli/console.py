"""What people see: errors, tables, and the progress of a stage.

Results go to stdout; progress, notices and errors to stderr.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from io import TextIOWrapper
from typing import TextIO

from rich import box
from rich.console import Console, RenderableType
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from denserl_cli.core.errors import DenserlError, Interrupted
from denserl_cli.core.tracking import Observer

_UNBOUNDED = 100_000
_SECONDS_BETWEEN_LINES = 5.0


def make_console(stream: TextIO) -> Console:
    """Return a console that folds at a terminal's edge and never folds into a pipe or file.

    What the stream's encoding lacks is written as its code, not an error.
    """
    if isinstance(stream, TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")
    terminal = Console(file=stream)
    return terminal if terminal.is_terminal else Console(file=stream, width=_UNBOUNDED)


def error_panel(error: DenserlError) -> Panel:
    """Frame an error and what to do about it."""
    text = Text(error.message)
    if error.hint:
        text.append(f"\n{error.hint}", style="dim")
    title, style = ("Interrupted", "yellow") if isinstance(error, Interrupted) else ("Error", "red")
    return Panel(text, title=title, title_align="left", border_style=style)


def print_error(error: DenserlError) -> None:
    """Show an error on stderr: framed on a terminal, as plain unfolded lines otherwise."""
    if sys.stderr.isatty():
        make_console(sys.stderr).print(error_panel(error))
        return
    word = "interrupted" if isinstance(error, Interrupted) else "error"
    several = "\n" if "\n" in error.message else " "  # each problem's place starts its line
    print(f"{word}:{several}{error.message}", file=sys.stderr)
    if error.hint:
        print(f"hint: {error.hint}", file=sys.stderr)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table on stdout."""
    make_console(sys.stdout).print(make_table(title, columns, rows))


def make_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> Table:
    """A table whose numbers are right-aligned and whose long cells are folded, never cut."""
    table = Table(title=Text(title) if title else None, title_justify="left", box=box.SIMPLE_HEAD)
    for place, column in enumerate(columns):
        cells = [row[place] for row in rows if row[place] is not None]
        numbers = bool(cells) and all(isinstance(cell, int | float) for cell in cells)
        table.add_column(Text(column), justify="right" if numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(_cell(value)) for value in row))
    return table


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class Pace:
    """How fast one piece of work goes, measured from its start."""

    def __init__(self, title: str, total: int | None, done: int) -> None:
        self.title, self.total, self.done = title, total, done
        self.figures: dict[str, float] = {}
        self._earlier = done
        self._start = time.monotonic()

    def advance(self, count: int, figures: dict[str, float]) -> None:
        """Count finished units and keep the latest figures."""
        self.done += count
        self.figures = {**self.figures, **figures}

    @property
    def count(self) -> str:
        """`done/total`, or `done` alone where the total is unknown."""
        return str(self.done) if self.total is None else f"{self.done}/{self.total}"

    @property
    def rate(self) -> str:
        """Units per second or, where that is below one, seconds per unit."""
        per_second = self._per_second()
        if per_second == 0:
            return ""
        return f"{per_second:.1f}/s" if per_second >= 1 else f"{1 / per_second:.1f} s each"

    @property
    def left(self) -> str:
        """Time left at this pace; empty where it is unknown."""
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
        """The latest figures."""
        return "  ".join(f"{name} {value:.4g}" for name, value in self.figures.items())

    def _per_second(self) -> float:
        return (self.done - self._earlier) / max(time.monotonic() - self._start, 1e-9)


def clock(seconds: float) -> str:
    """Write a duration as m:ss or h:mm:ss."""
    minutes, rest = divmod(max(round(seconds), 0), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class ConsoleObserver(Observer):
    """What both observers share: pieces of work may nest, and leaving the context ends them all."""

    def __init__(self) -> None:
        self._work: list[Pace] = []

    def __enter__(self) -> ConsoleObserver:
        return self

    def __exit__(self, *_: object) -> None:
        while self._work:
            self.end()

    def begin(self, title: str, total: int | None = None, done: int = 0) -> None:
        """Start a piece of work, inside the current one if there is one."""
        self._work.append(Pace(title, total, done))

    def advance(self, count: int = 1, /, **figures: float) -> None:
        """Count finished units of the innermost piece of work."""
        self._work[-1].advance(count, figures)

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

    def advance(self, count: int = 1, /, **figures: float) -> None:
        """Count finished units, with a line if the last one is some seconds ago."""
        super().advance(count, **figures)
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


class _Display(Progress):
    """A bar for each piece of work, its figures on a line of their own."""

    def __init__(self, console: Console) -> None:
        words = ("count", "rate", "elapsed", "left")
        columns = [TextColumn(f"{{task.fields[pace].{word}}}", markup=False) for word in words]
        title = TextColumn("{task.description}", markup=False)
        super().__init__(title, BarColumn(bar_width=20), *columns, console=console)

    def get_renderables(self) -> Iterator[RenderableType]:
        """Yield what is on the screen, from top to bottom."""
        for task in self.tasks:
            yield self.make_tasks_table([task])
            if task.fields["pace"].latest:
                yield Text(f"  {task.fields['pace'].latest}", style="dim")


class TerminalObserver(ConsoleObserver):
    """A live display that outlasts the work on the screen."""

    def __init__(self) -> None:
        super().__init__()
        self._console = make_console(sys.stderr)
        self._progress: Progress | None = None
        self._bars: list[TaskID] = []

    def begin(self, title: str, total: int | None = None, done: int = 0) -> None:
        """Add a bar; the first one starts the display."""
        super().begin(title, total, done)
        if self._progress is None:
            self._progress = _Display(self._console)
            self._progress.start()
        pace = self._work[-1]
        self._bars.append(self._progress.add_task(title, total=total, completed=done, pace=pace))

    def advance(self, count: int = 1, /, **figures: float) -> None:
        """Move the innermost bar."""
        super().advance(count, **figures)
        assert self._progress is not None
        self._progress.advance(self._bars[-1], count)

    def end(self) -> None:
        """Take an inner bar away; the outermost stays on the screen and ends the display."""
        super().end()
        assert self._progress is not None
        bar = self._bars.pop()
        if self._bars:
            self._progress.remove_task(bar)
        else:
            self._progress.stop()
            self._progress = None

    def notice(self, message: str) -> None:
        """Print the message above the bars."""
        self._console.print(f"note: {message}", markup=False, highlight=False, style="yellow")

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Print a result on stdout, with the live display out of the way."""
        if self._progress is not None:
            self._progress.stop()
        super().table(title, columns, rows)
        if self._progress is not None:
            self._progress.start()


def make_observer() -> ConsoleObserver:
    """Return the live display on a terminal, plain lines elsewhere."""
    return TerminalObserver() if sys.stderr.isatty() else PlainObserver()
