"""Segments on a terminal: the text in pieces, then a table of them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.text import Text

from denserl_cli.console import make_console, print_table

if TYPE_CHECKING:
    from denserl_cli.core.inspection import SegmentedResponse


def print_segments(responses: Sequence[SegmentedResponse]) -> None:
    """Print responses cut into segments: the text in alternating colours, then a table of them."""
    console = make_console(sys.stdout)
    for response in responses:
        text = Text()
        for place, segment in enumerate(response.segments):
            text.append("│" if place else "", style="dim")
            text.append(segment.text, style=("cyan", "magenta")[place % 2])
        heading = (
            response.label
            if response.score is None
            else (f"{response.label}: score {response.score:.3f}")
        )
        console.print(Text(heading, style="bold"))
        console.print(Text(response.prompt, style="dim"))
        console.print(text)
        rows = [
            [k, s.end - s.start + 1, s.entropy, s.value, s.reward, s.text.strip()]
            for k, s in enumerate(response.segments, 1)
        ]
        print_table("", ["#", "tokens", "entropy", "value", "reward", "text"], rows)
