"""Errors and tables on a terminal or in a log.

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
    """Return a console that folds lines on a terminal and leaves them whole in a pipe or file.

    Characters that the stream's encoding lacks are written as their codes.
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
    """Show an error on stderr: framed on a terminal, as plain whole lines otherwise."""
    if sys.stderr.isatty():
        console = make_console(sys.stderr)
        console.show_cursor()  # a live display that was killed leaves it hidden
        console.print(error_panel(error))
        return
    kind = "interrupted" if isinstance(error, Interrupted) else "error"
    several = "\n" if "\n" in error.message else " "  # each of several problems has its own line
    print(f"{kind}:{several}{error.message}", file=sys.stderr)
    if error.hint:
        print(f"hint: {error.hint}", file=sys.stderr)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table on stdout."""
    make_console(sys.stdout).print(make_table(title, columns, rows))


def make_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> Table:
    """A table with right-aligned numbers; long cells are folded, never cut off."""
    table = Table(title=Text(title) if title else None, title_justify="left", box=box.SIMPLE_HEAD)
    for index, column in enumerate(columns):
        cells = [row[index] for row in rows if row[index] is not None]
        numbers = bool(cells) and all(isinstance(cell, int | float) for cell in cells)
        table.add_column(Text(column), justify="right" if numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(_cell(value)) for value in row))
    return table


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
