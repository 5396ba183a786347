"""What is held out for evaluation: whole prompts, drawn with a seed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from denserl_cli.core.data.arrow_rows import PairRows, PromptRows


def split_pairs(rows: PairRows, count: int, seed: int) -> tuple[PairRows, PairRows]:
    """Split into training and evaluation: about `count` pairs, at most a tenth, are held out.

    Pairs with one prompt stay on one side.
    """
    held = held_out(rows.groups(), count, seed)
    return rows.take(~held), rows.take(held)


def split_prompts(prompts: PromptRows, count: int, seed: int) -> tuple[PromptRows, PromptRows]:
    """Split into training and evaluation: `count` prompts, at most a tenth, are held out.

    Equal prompts stay on one side.
    """
    held = held_out(prompts.groups(), count, seed)
    return prompts.take(~held), prompts.take(held)


def held_out_rows(rows: int, asked: int) -> int:
    """How many rows are held out for evaluation at most: those asked for, or a tenth."""
    return min(asked, rows // 10)


def held_out(groups: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Draw whole groups until `count` rows or a tenth is held out; a larger group stays.

    groups: the number of each row's group (N,), from 0 by first use. Returns (N,) bool.
    """
    sizes = np.bincount(groups)
    room, drawn = held_out_rows(len(groups), count), np.zeros(len(sizes), bool)
    for group in np.random.default_rng(seed).permutation(len(sizes)):
        if not room:
            break
        if sizes[group] <= room:
            drawn[group] = True
            room -= sizes[group]
    return drawn[groups]
