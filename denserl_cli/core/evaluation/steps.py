"""evaluate rm on process labels: how often a reward model knows a right step from a wrong one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from denserl_cli.core.data.arrow_rows import StepRows
from denserl_cli.core.data.batches import micro_batches
from denserl_cli.core.data.packing import collate_steps
from denserl_cli.core.data.steps import EncodedStepRow, step_targets
from denserl_cli.core.errors import DenserlError
from denserl_cli.core.models.device import device
from denserl_cli.core.models.scalar_head import token_values
from denserl_cli.core.reward_model.step_trainer import describe_steps, step_values

if TYPE_CHECKING:
    from torch import Tensor

    from denserl_cli.core.observer import Observer
    from denserl_cli.core.scoring.scorer import Scorer


@torch.no_grad()
def evaluate_steps(
    rows: StepRows, scorer: Scorer, batch_size: int, pad_id: int, observer: Observer
) -> dict[str, Any]:
    """Loss and accuracy of a reward model's values at the ends of labelled steps.

    Args:
        rows: Responses in steps, of the reward model's own tokenizer.
        scorer: Has the reward model; its segments are not used.
        batch_size: Pairs, or twice as many responses, in one forward pass.
        pad_id: Token that fills batches up.
        observer: Told progress.

    Raises:
        DenserlError: The reward model has no value at every token.
    """
    model = scorer.reward_model
    if model is None or scorer.read is not token_values:
        raise DenserlError(
            "this reward model scores whole responses, and the rows are steps with labels",
            hint="evaluate it on preference pairs: --data PAIRS",
        )

    def forward(some: Sequence[EncodedStepRow]) -> tuple[Tensor, Tensor]:
        values = model(token_values, collate_steps(some, pad_id, device(), packed=scorer.packs))
        ends, labels = step_targets(some, values.shape[1], values.device)
        return values[ends].float(), labels[ends]

    parts = micro_batches(rows.lengths(), np.arange(len(rows)), 2 * batch_size)
    values, labels = step_values(rows, parts, forward, observer)
    if not np.isfinite(values).all():
        raise DenserlError(
            "the reward model's values are not finite",
            hint="its weights are damaged or overflow; try --set model.dtype=float32",
        )
    found = {"responses": len(rows), "labelled_steps": len(values)}
    return {**found, **describe_steps(values, labels, rows)}
