"""Rewards on a terminal: as a colour, and as a number for those who see no colours."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.color import Color
from rich.style import Style
from rich.text import Text

_BAD, _NEUTRAL, _GOOD = (255, 194, 153), (238, 238, 238), (156, 200, 247)
_INK = Color.from_rgb(0, 0, 0)
_JOINERS = "\u200c\u200d"


def heat(reward: float, most: float) -> Style:
    """The style of a reward: orange below zero, blue above, paler near zero.

    most: absolute reward at which the colour is strongest.
    """
    if not math.isfinite(reward):
        return Style(reverse=True)
    share = min(abs(reward) / most, 1.0) if most > 0 else 0.0
    end = _GOOD if reward > 0 else _BAD
    ground = [round(a + (b - a) * share) for a, b in zip(_NEUTRAL, end, strict=True)]
    return Style(color=_INK, bgcolor=Color.from_rgb(*ground))


def heated(texts: Sequence[str], rewards: Sequence[float], most_cells: int) -> Text:
    """A response on one line of text: each segment in its colour, followed by its reward.

    Args:
        texts: Of the segments.
        rewards: Of the segments.
        most_cells: The rest is left out when the line is longer than this.
    """
    most = max((abs(reward) for reward in rewards if math.isfinite(reward)), default=0.0)
    digits = _digits(most)
    line = Text()
    for text, reward in zip(texts, rewards, strict=True):
        if len(line) > most_cells:
            break
        line.append(visible(text[:most_cells]), style=heat(reward, most))
        line.append(f"[{reward:+.{digits}f}]", style="dim")
    return line


def _digits(most: float) -> int:
    """Digits after the point: 2, or as many as the largest reward needs for two digits."""
    return min(max(2, 1 - math.floor(math.log10(most))), 9) if most > 0 else 2


def visible(text: str, keep: str = "") -> str:
    """The text without characters that move a terminal's cursor or change its state.

    keep: white space that is not replaced.
    """
    text = text if "\n" in keep else text.replace("\n", "↵")
    kept = _JOINERS + keep
    return "".join(c if c.isprintable() or c in kept else repr(c)[1:-1] for c in text)
