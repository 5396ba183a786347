"""Rewards of the study, through any user's door: the true rewards of its tasks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from denserl_cli.core.sandbox.task import MOODS, STRAY_WORTH, Task
from denserl_cli.core.segmentation_rules import SENTENCE


def phrase_worth(prompts: Sequence[str], segments: Sequence[Any], recipe: Any) -> list[list[float]]:
    """The mean worth of what a segment holds: of its phrase, where it is a whole one."""
    task = Task(recipe.sandbox, recipe.seed)
    rewards = []
    for prompt, pieces in zip(prompts, segments, strict=True):
        worth = task.worth[MOODS.index(prompt.split()[1])]
        parts = [[phrase for _, phrase in task.parse(piece.text)] for piece in pieces]
        rewards.append(
            [
                sum(STRAY_WORTH if k is None else float(worth[k]) for k in found)
                / max(1, len(found))
                for found in parts
            ]
        )
    return rewards


def plain(responses: Sequence[str]) -> list[float]:
    """How plainly a text is written: the mean over its sentences, of at least three.

    A sentence of 4 to 12 words is worth 1, one of more than 20 words −1, one that has been said
    already −1, any other 0; a sentence that is missing counts 0.
    """
    return [_plain([one.strip() for one in sentences(text)]) for text in responses]


def sentences(text: str) -> list[str]:
    """The sentences of a text, cut as `segmentation.cut: sentence` has it."""
    ends = [match.end(2) for match in SENTENCE.finditer(text) if match.group(1)]
    return [text[a:b] for a, b in pairwise([0, *ends, len(text)]) if text[a:b].strip()]


def _plain(said: Sequence[str]) -> float:
    total = 0.0
    for place, sentence in enumerate(said):
        words = len(sentence.split())
        if words > 20 or sentence in said[:place]:
            total -= 1
        elif 4 <= words <= 12:
            total += 1
    return total / max(3, len(said))
