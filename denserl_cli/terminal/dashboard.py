"""The live display of a stage on a terminal: bars, throughput, curves and the latest samples.

It fits the terminal's current height and width; where there are too few lines, the samples are left
out first and then the last curves.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.control import Control
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.segment import ControlType, Segment, SegmentLines
from rich.text import Text

from denserl_cli.core.system.verbosity import verbosity
from denserl_cli.terminal.console import make_console, print_table
from denserl_cli.terminal.progress import ConsoleObserver, PlainObserver, QuietObserver, number
from denserl_cli.terminal.reward_colors import heated, visible
from denserl_cli.terminal.sparkline import Curve, binned, sparkline

CURVES = (
    *("true_reward", "loss", "accuracy", "eval_accuracy"),
    *("rm_score", "kl", "response_length", "segments_per_response", "eval_rm_score"),
    *("eval_loss", "explained_variance", "gradient_norm", "mismatch_kl", "importance_capped"),
)
"""The metrics that have a curve, the most important first; metrics.jsonl has all metrics.

The metrics of reward functions, if there are any, come before them.
"""
_SPEEDS = {"tokens_per_second": "tokens/s", "responses_per_second": "responses/s"}
_PHASES = ("rollout", "scoring", "update")
_REFRESHES_PER_SECOND = 1
_WIDE = 140
"""Columns from which on two curves stand side by side."""
_LEAST_SAMPLE = 3
"""The fewest lines to show of a sample: its heading, its prompt, and one of text."""

Lines = list[list[Segment]]


class LiveCurves:
    """The metrics of a stage, their curves, and its latest samples."""

    def __init__(self) -> None:
        self.metrics: Mapping[str, Any] = {}
        self.samples: tuple[int, list[Mapping[str, Any]]] = (0, [])
        self._curves, self._function_curves = {name: Curve() for name in CURVES}, dict[str, Curve]()

    def add(self, metrics: Mapping[str, Any]) -> None:
        """Add the metrics of the next step."""
        self.metrics = metrics
        self._add_function_curves(metrics)
        for name, curve in (self._function_curves | self._curves).items():
            if name in metrics:
                value = metrics[name]
                curve.add(math.nan if value is None else value)

    def add_sample(self, step: int, sample: Mapping[str, Any]) -> None:
        """Add a sample; those of earlier steps are dropped."""
        latest, samples = self.samples
        self.samples = (step, [*samples, sample] if step == latest else [sample])

    def _add_function_curves(self, metrics: Mapping[str, Any]) -> None:
        """Add curves for reward functions and, without a reward model, for the dense reward."""
        if not metrics.keys() & {"kl", "eval_kl"}:
            return  # the reward_mean of train-rm is not that of a function
        functions = [name.removeprefix("eval_") for name in metrics]
        functions = [name for name in functions if name.startswith("reward_")]
        without = [] if {"rm_score", "eval_rm_score"} & metrics.keys() else ["dense_reward"]
        for name in (*functions, *without, *(f"eval_{name}" for name in functions)):
            self._function_curves.setdefault(name, Curve())

    def throughput(self) -> Text:
        """Speeds and the seconds of each phase, as far as the metrics have them."""
        parts = [f"{number(self.metrics[k])} {unit}" for k, unit in _SPEEDS.items() if self._has(k)]
        for phase in _PHASES:
            if self._has(f"{phase}_seconds"):
                parts.append(f"{phase} {self.metrics[f'{phase}_seconds']:.1f} s")
        return Text("  ".join(parts), no_wrap=True, overflow="ellipsis")

    def curves(self, width: int) -> list[Text]:
        """A line for each metric, two on a line where there is room."""
        curves = self._function_curves | self._curves
        shown = {name: one for name, one in curves.items() if one.points}
        side_by_side = 2 if width >= _WIDE else 1
        cells = [_curve(name, curve, width // side_by_side) for name, curve in shown.items()]
        starts = range(0, len(cells), side_by_side)
        return [Text.assemble(*cells[i : i + side_by_side], no_wrap=True) for i in starts]

    def sample_texts(self, width: int, room: int) -> Iterator[list[Text]]:
        """Yield for each sample of the latest step its heading, its prompt and its segments.

        Args:
            width: Columns of the terminal.
            room: Lines that are free; of a long sample not much more than these is rendered.
        """
        step, samples = self.samples
        for sample in samples:
            about = [sample["label"]] if "label" in sample else []
            about += ["held out"] if sample.get("held_out") else []
            about += [f"score {number(_float(sample['score']))}"] if "score" in sample else []
            heading = f"sample of step {step}" + (f": {', '.join(about)}" if about else "")
            segments = sample["segments"]
            rewards = [_float(s["reward"] if "reward" in s else s["value"]) for s in segments]
            prompt = visible(sample["prompt"][: 2 * width])
            yield [
                Text(heading, style="bold"),
                Text(prompt, style="dim", no_wrap=True, overflow="ellipsis"),
                heated([s["text"] for s in segments], rewards, width * (room + 1)),
            ]

    def _has(self, name: str) -> bool:
        return isinstance(self.metrics.get(name), int | float)


def _curve(name: str, curve: Curve, width: int) -> Text:
    """`name ▁▂▃ latest (minimum … maximum)`, at most `width` columns."""
    points = curve.points
    finite = [point for point in points if math.isfinite(point)]
    scale = f"({number(min(finite))} … {number(max(finite))})" if finite else ""
    room = max(width - 54, 8)
    return Text.assemble(
        f"{name:<22} ",
        (f"{sparkline(binned(points, room)):<{room}}", "cyan"),
        (f" {number(curve.latest):>10}", "bold"),
        (f" {scale:<19} ", "dim"),
    )


class Display(Progress):
    """Bars for the pieces of work, and below them curves and samples as far as there is room."""

    def __init__(self, board: LiveCurves, console: Console) -> None:
        self.board, self._terminal = board, console
        self._bar, self._widths = BarColumn(), list[int]()
        fields = ("count", "rate", "elapsed", "left")
        columns = [TextColumn(f"{{task.fields[pace].{field}}}", markup=False) for field in fields]
        super().__init__(
            TextColumn("{task.description}", markup=False),
            self._bar,
            *columns,
            console=console,
            refresh_per_second=_REFRESHES_PER_SECOND,
        )

    def get_renderables(self) -> Iterator[RenderableType]:
        """Yield what is on the screen."""
        width, height = self._terminal.size
        self._go_up(width)
        lines = self._lines(width, height - 1)
        self._widths = [Segment.get_line_length(line) for line in lines]
        yield SegmentLines(lines, new_lines=True)

    def _lines(self, width: int, room: int) -> Lines:
        self._bar.bar_width = 20 if width >= 100 else 10
        blocks: list[RenderableType] = [self.make_tasks_table(self.tasks)]
        if curves := self.board.curves(width):
            blocks += [self.board.throughput(), *curves]
        else:
            latest = [task.fields["pace"].latest for task in self.tasks]
            blocks += [Text(f"  {text}", style="dim") for text in latest if text]
        lines = self._rendered(Group(*blocks))[:room]
        for sample in self.board.sample_texts(width, room):
            if len(lines) + _LEAST_SAMPLE > room:
                break
            lines += self._cut(self._rendered(Group(*sample)), room - len(lines))
        return lines

    def _rendered(self, block: RenderableType) -> Lines:
        return self._terminal.render_lines(block, pad=False)

    def _cut(self, lines: Lines, room: int) -> Lines:
        return lines if len(lines) <= room else [*lines[: room - 1], [Segment("…")]]

    def _go_up(self, width: int) -> None:
        """Clear the lines that a terminal has added by folding when it became narrower."""
        more = sum(max(-(-length // width) - 1, 0) for length in self._widths)
        if more:
            clear = (ControlType.ERASE_IN_LINE, 2)
            up = ((ControlType.CURSOR_UP, 1), clear)
            self._terminal.control(Control(ControlType.CARRIAGE_RETURN, clear, *up * more))


class TerminalObserver(ConsoleObserver):
    """A live display; its bars and curves stay on the screen at the end."""

    def __init__(self) -> None:
        super().__init__()
        self._console = make_console(sys.stderr)
        self._board = LiveCurves()
        self._display: Display | None = None
        self._bars: list[TaskID] = []

    def begin(self, title: str, total: int | None = None, done: int = 0) -> None:
        """Add a bar; the first one starts the display."""
        super().begin(title, total, done)
        if self._display is None:
            self._display = Display(self._board, self._console)
            self._display.start()
        title = "  " * len(self._bars) + title
        bar = self._display.add_task(title, total=total, completed=done, pace=self._work[-1])
        self._bars.append(bar)

    def advance(self, count: int = 1, /, **metrics: float) -> None:
        """Move the innermost bar."""
        super().advance(count, **metrics)
        assert self._display is not None
        self._display.advance(self._bars[-1], count)

    def metrics(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Add a step's metrics to the curves."""
        self._board.add(metrics)

    def sample(self, step: int, sample: Mapping[str, Any]) -> None:
        """Show the sample instead of those of earlier steps."""
        self._board.add_sample(step, sample)

    def end(self) -> None:
        """Remove an inner bar; the outermost stays on the screen and ends the display."""
        super().end()
        assert self._display is not None
        bar = self._bars.pop()
        if self._bars:
            self._display.remove_task(bar)
        else:
            self._board.samples = (0, [])
            self._display.stop()
            self._display, self._board = None, LiveCurves()

    def notice(self, message: str) -> None:
        """Print the message above the bars."""
        self._console.print(f"note: {message}", markup=False, highlight=False, style="yellow")

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Print a result on stdout while the live display is stopped."""
        if self._display is not None:
            self._display.stop()
        print_table(title, columns, rows)
        if self._display is not None:
            self._display.start()


def make_observer() -> ConsoleObserver:
    """Return the live display on a terminal, plain lines elsewhere and in a CI log.

    With `--quiet`: notes and results, no progress. With `--verbose`: plain lines, which go
    together with what the libraries print.
    """
    if verbosity() == "quiet":
        return QuietObserver()
    if verbosity() == "verbose":
        return PlainObserver()
    if sys.stderr.isatty() and make_console(sys.stderr).is_interactive and not os.environ.get("CI"):
        return TerminalObserver()
    return PlainObserver()


def _float(value: float | None) -> float:
    return math.nan if value is None else value
