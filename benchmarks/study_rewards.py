"""Rewards of the study, through any user's door: what a perfect reward model would say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from denserl_cli.core.sandbox import MOODS, STRAY_WORTH, Task


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
