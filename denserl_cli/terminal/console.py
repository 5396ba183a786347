"""What people see: errors and tables.

Results go to stdout; progress, notices and errors to stderr.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from io import TextIOWrapper
from typing import TextIO

from rich import box
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from denserl_cli.core.errors import DenserlError, Interrupted

_UNBOUNDED = 100_000


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
        console = make_console(sys.stderr)
        console.show_cursor()  # a live display may have hidden it whose process was killed
        console.print(error_panel(error))
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
