"""Whether a recipe's segments are the steps that a reward model learns."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from denserl_cli.core.data.batches import response_windows
from denserl_cli.core.data.steps import step_targets
from denserl_cli.core.segmentation_rules import Cutter

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from denserl_cli.core.data.arrow_rows import StepRows
    from denserl_cli.core.recipe.resolved import ResolvedSegmentation

LOOKED_AT = 256
"""Responses that are cut as the recipe says, to compare."""
_ADVICE = (
    "set segmentation.granularity=segment, segmentation.cut=newline and segmentation.cutoff=null "
    "to score the steps themselves"
)


def step_segments_notice(
    rows: StepRows, segmentation: ResolvedSegmentation, tokenizer: PreTrainedTokenizerBase
) -> str | None:
    """What to say where the segments that a reward model will score are not the data's steps.

    Args:
        rows: What it is trained on; the first responses are looked at.
        segmentation: Where responses are cut when they are scored.
        tokenizer: Of the rows.

    Returns:
        A sentence; None where they are the same.
    """
    by_text = segmentation.granularity == "segment" and segmentation.cut in ("newline", "sentence")
    if not by_text:
        which: str = segmentation.granularity
        if which == "segment":
            which = f"segment, cut {segmentation.cut}"
        return (
            "the reward model learns the steps of the data and will score other segments "
            f"(segmentation: {which}); {_ADVICE}"
        )
    whole = np.flatnonzero(~rows.numbers("truncated").astype(bool))
    some = list(rows.take(whole[:LOOKED_AT]))
    if not some:
        return None
    windows, mask = map(torch.from_numpy, response_windows([row.response for row in some], 0))
    found = Cutter(segmentation, tokenizer)(windows, None, mask, None)
    other = int((found != step_targets(some, mask.shape[1]).ends).any(1).sum())
    if not other:
        return None
    advice = _ADVICE
    if segmentation.cut == "newline":
        advice = "their steps have line breaks inside"
    return (
        f"{other} of {len(some)} responses have other segments (segmentation.cut: "
        f"{segmentation.cut}) than the steps that the reward model learns; {advice}"
    )
