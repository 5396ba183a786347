"""Segments on a terminal or in a log: the text in pieces, then a table of them.

Everything that a colour shows is shown by a mark or a number as well.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from denserl_cli.terminal.console import make_console, make_table, print_table
from denserl_cli.terminal.reward_colors import visible

if TYPE_CHECKING:
    from denserl_cli.core.inspection.compare import View
    from denserl_cli.core.inspection.statistics import CutStatistics
    from denserl_cli.core.inspection.traces import Segment, SegmentedResponse

SIDE_BY_SIDE = 150
"""Columns from which on two responses stand side by side."""
PEAK, END = "▲", "│"
_LAYOUT = "\n\t"
LEVELS = (-1.5, -0.5, 0.5, 1.5)
"""Where the heat scale changes, in standard deviations of the reward."""
MARKS = ("⁻⁻", "⁻", "·", "⁺", "⁺⁺")
HEAT = ("on #ffc299", "on #ffe3cf", "on #eeeeee", "on #d3e6fb", "on #9cc8f7")
TEXT = ("#003a8c", "#7a1065")
"""Alternating colours of segments on the heat scale, which is light on any terminal."""
PLAIN_TEXT = ("cyan", "magenta")
"""The same without rewards, on the terminal's background."""


def print_segments(responses: Sequence[SegmentedResponse], at_peaks: bool) -> None:
    """Print responses cut into segments, chosen beside rejected where there is room.

    Args:
        responses: In segments.
        at_peaks: Whether their segments end at peaks of the entropy.
    """
    from denserl_cli.core.inspection.traces import in_pairs

    _print_legend(responses)
    end = _end(at_peaks)
    for pair in in_pairs(responses):
        _print_prompt(pair[0])
        _print_beside([_response(response, response.label, end) for response in pair])


def print_comparison(views: Sequence[View]) -> None:
    """Print responses as both views cut them, then how far they agree."""
    from denserl_cli.core.inspection.compare import agreement

    cuts = [[view.cut(trace) for trace in view.traces] for view in views]
    _print_legend([response for cut in cuts for response in cut])
    ends = [_end(view.cut.at_peaks) for view in views]
    for both in zip(*cuts, strict=True):
        _print_prompt(both[0])
        _print_beside(
            [
                _response(response, f"{letter} ({view.name}) {response.label}", end)
                for letter, view, response, end in zip("AB", views, both, ends, strict=True)
            ]
        )
    found = agreement(*cuts)
    rows = [
        [letter, view.name, count, count / found.responses, inside, found.shared / max(inside, 1)]
        for letter, view, count, inside in zip(
            "AB", views, found.segments, found.boundaries, strict=True
        )
    ]
    columns = ["", "cut by", "segments", "per response", "boundaries", "share in both"]
    print_table(f"{found.responses} responses: boundaries agree, F1 {found.f1:.3f}", columns, rows)


def print_statistics(found: Sequence[CutStatistics], own: float | None) -> None:
    """Print statistics of segments at several cutoffs; `own` is the recipe's."""
    columns = {
        "segments": "segments",
        "count_mean": "per response",
        "length_mean": "tokens",
        "length_p10": "10 %",
        "length_median": "median",
        "length_p90": "90 %",
        "length_max": "longest",
        "single_tokens": "of one",
    }
    rows = [
        [f"{one.cutoff:.4g}" + (" *" if one.cutoff == own else ""),
         *(metrics[name] for name in columns)]
        for one in found
        for metrics in [one.metrics()]
    ]  # fmt: skip
    title = f"{len(found[0].counts)} responses, lengths of segments in tokens"
    print_table(title, ["cutoff", *columns.values()], rows)
    if own is not None:
        make_console(sys.stdout).print(Text("* the recipe's cutoff", style="dim"))


def _print_legend(responses: Iterable[SegmentedResponse]) -> None:
    """Explain the marks that occur."""
    segments = [segment for response in responses for segment in response.segments]
    legend = [f"{PEAK} entropy peak, {END} other end of a segment"]
    if any(_heat(segment) is not None for segment in segments):
        legend.append(f"reward from low to high: {' '.join(MARKS)}")
    make_console(sys.stdout).print(Text("; ".join(legend), style="dim"))


def _print_prompt(response: SegmentedResponse) -> None:
    make_console(sys.stdout).print(Text(visible(response.prompt, _LAYOUT), style="dim"))


def _print_beside(blocks: Sequence[RenderableType]) -> None:
    """Print blocks beside each other on a wide terminal, else below each other."""
    console = make_console(sys.stdout)
    if len(blocks) == 2 and console.is_terminal and console.width >= SIDE_BY_SIDE:
        grid = Table.grid(padding=(0, 2), expand=True)
        for _ in blocks:
            grid.add_column(ratio=1)
        grid.add_row(*blocks)
        console.print(grid)
        return
    for block in blocks:
        console.print(block)


def _response(response: SegmentedResponse, title: str, end: str) -> RenderableType:
    """A heading, the text in segments, and the table of segments."""
    count = len(response.segments)
    parts = [title, f"{count} segment{'s' if count > 1 else ''}"]
    if response.score is not None:
        parts.insert(1, f"score {response.score:.3f}")
    if not response.terminated:
        parts.append("cut at the length limit")
    heading = Text(visible(", ".join(parts)), style="bold")
    return Group(heading, _text(response, end), _table(response))


def _end(at_peaks: bool) -> str:
    """What stands between two segments."""
    return PEAK if at_peaks else END


def _text(response: SegmentedResponse, end: str) -> Text:
    text, last = Text(), len(response.segments) - 1
    levels = _levels(response.segments)
    for k, (segment, level) in enumerate(zip(response.segments, levels, strict=True)):
        colours = PLAIN_TEXT if level is None else TEXT
        style = colours[k % 2] if level is None else f"{colours[k % 2]} {HEAT[level]}"
        text.append(visible(segment.text, _LAYOUT), style=style)
        if level is not None:
            text.append(MARKS[level], style=f"bold {style}")
        if k < last:
            text.append(end, style="bold")
    return text


def _table(response: SegmentedResponse) -> Table:
    """The table of segments, without columns that have no numbers."""
    segments = response.segments
    columns = {
        "entropy": [s.entropy for s in segments],
        "raw": [s.value for s in segments],
        "reward": [s.reward for s in segments],
        "per token": [s.per_token for s in segments],
    }
    shown = {name: values for name, values in columns.items() if set(values) != {None}}
    texts = [visible(s.text.strip()) for s in segments]
    rows = [
        [k + 1, s.end - s.start + 1, *(values[k] for values in shown.values()), texts[k]]
        for k, s in enumerate(segments)
    ]
    return make_table("", ["#", "tokens", *shown, "text"], rows)


def _heat(segment: Segment) -> float | None:
    """What the heat scale shows: the normalised reward, or the raw one."""
    return segment.value if segment.reward is None else segment.reward


def _levels(segments: Sequence[Segment]) -> list[int | None]:
    """The level of each segment on the heat scale; raw rewards are standardised first."""
    heats = [_heat(segment) for segment in segments]
    known = [heat for heat in heats if heat is not None]
    if len(known) < len(segments):
        return [None] * len(segments)
    scores = np.array(known)
    if segments[0].reward is None:
        scores = (scores - scores.mean()) / (scores.std() or 1.0)
    return [int(level) for level in np.searchsorted(LEVELS, scores)]
