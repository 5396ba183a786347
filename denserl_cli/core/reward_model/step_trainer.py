"""train-rm on process labels: binary cross-entropy at the last token of every labelled step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from denserl_cli.core.chat.decoding import segment_values
from denserl_cli.core.data.arrow_rows import StepRows
from denserl_cli.core.data.batches import micro_batches
from denserl_cli.core.data.packing import collate_steps
from denserl_cli.core.data.steps import EncodedStepRow, step_targets
from denserl_cli.core.models.device import device
from denserl_cli.core.models.scalar_head import token_values
from denserl_cli.core.reward_model.metrics import (
    Floats,
    Metrics,
    first_wrong_accuracy,
    step_metrics,
    to_numbers,
)
from denserl_cli.core.reward_model.objective import check_unset
from denserl_cli.core.reward_model.training import ScalarTrainer
from denserl_cli.core.system.distributed import all_reduce_sum, shard_micro_batches, world_size

if TYPE_CHECKING:
    from torch import Tensor

    from denserl_cli.core.observer import Observer
    from denserl_cli.core.recipe.resolved import ResolvedRecipe
    from denserl_cli.core.runs.folder import RunFolder


class StepTrainer(ScalarTrainer[StepRows]):
    """Trains a reward model on labelled steps: its value is the log-odds that a step is right."""

    unit, cuts = "responses", False

    def __init__(
        self, recipe: ResolvedRecipe, run: RunFolder, observer: Observer, **data: Any
    ) -> None:
        """Load the model. data: the other arguments of `ScalarTrainer`."""
        check_unset(recipe.reward_model)
        super().__init__(recipe, run, observer, **data)
        self.lengths, self.counts = self.rows.lengths(), self.rows.numbers("ends")

    def parts(self, indices: np.ndarray) -> list[np.ndarray]:
        """The responses of each micro-batch, with the least padding."""
        return micro_batches(self.lengths[indices], indices, self.settings.micro_batch_size)

    def count(self, rows: np.ndarray) -> int:
        """Labelled steps: metrics are means over them."""
        return int(self.counts[rows].sum())

    def micro_batch(self, part: np.ndarray, beside: Sequence[np.ndarray]) -> Metrics:
        """Loss and metrics of one micro-batch, a single forward pass."""
        rows = [self.rows[i] for i in part]
        return step_metrics(*self.forward(rows))

    def forward(self, rows: Sequence[EncodedStepRow]) -> tuple[Tensor, Tensor]:
        """Values and labels of all steps of some responses, row by row: (N,) each."""
        batch = collate_steps(rows, self.pad_id, device(), packed=self.packs)
        values = self.engine(token_values, batch)
        ends, labels = step_targets(rows, values.shape[1], values.device)
        return values[ends].float(), labels[ends]

    @torch.no_grad()
    def evaluate(self) -> dict[str, Any]:
        """Loss and metrics of the evaluation's steps, and how well first wrong steps are found."""
        rows = self.evaluation
        if not rows:
            return {}
        self.engine.model.eval()
        size = 2 * self.settings.micro_batch_size
        parts = micro_batches(rows.lengths(), np.arange(len(rows)), size)
        values, labels = step_values(rows, parts, self.forward, self.session.observer)
        self.engine.model.train()
        return {
            f"eval_{name}": value for name, value in describe_steps(values, labels, rows).items()
        }

    @torch.no_grad()
    def samples(self) -> list[dict[str, Any]]:
        """One response, always the same one, with the values and labels of its steps."""
        if not self.log_samples:
            return []
        row = (self.evaluation or self.rows)[0]
        self.engine.model.eval()
        values, _ = self.forward([row])
        self.engine.model.train()
        at = np.zeros(len(row.response))
        at[row.ends] = values.double().cpu().numpy()
        parts = segment_values(self.tokenizer, row.response, row.ends.tolist(), at.tolist())
        return [
            {
                "prompt": self.tokenizer.decode(row.prompt, skip_special_tokens=True),
                "label": "steps",
                "score": float(values.mean()),
                "labels": row.labels.tolist(),
                "segments": parts,
            }
        ]

    def tokens(self, indices: np.ndarray) -> int:
        """Tokens of a global batch, without padding."""
        return int(self.lengths[indices].sum())

    def responses(self, indices: np.ndarray) -> int:
        """Responses of a global batch."""
        return len(indices)

    def kept(self, indices: np.ndarray) -> dict[str, Any]:
        """A batch in a form that torch.save can write for inspection."""
        rows, names = [self.rows[i] for i in indices], ("prompt", "response", "ends", "labels")
        columns = {name: [torch.from_numpy(getattr(row, name)) for row in rows] for name in names}
        return {"origin": [row.origin for row in rows], **columns}


def step_values(
    rows: StepRows,
    parts: Sequence[np.ndarray],
    forward: Any,
    observer: Observer,
) -> tuple[Floats, Floats]:
    """Values and labels of all steps, response by response, the same in every process.

    Args:
        rows: R responses with N steps in all.
        parts: Row numbers of each forward pass.
        forward: Gives values and labels of the steps of some rows, (steps,) each.
        observer: Told progress.

    Returns:
        (N,) float64 each.
    """
    counts = rows.numbers("ends")
    starts = counts.cumsum() - counts
    found = torch.zeros(2, int(counts.sum()), device=device(), dtype=torch.float64)
    observer.begin("evaluate", total=len(rows))
    for part, mine in shard_micro_batches(parts):
        values, labels = forward([rows[i] for i in part])
        places = np.concatenate([np.arange(starts[i], starts[i] + counts[i]) for i in part])
        found[:, torch.from_numpy(places)] += torch.stack([values, labels]).double() * mine
        observer.advance(len(part) * world_size())
    observer.end()
    values, labels = all_reduce_sum(found).cpu().numpy()
    return values, labels


def describe_steps(values: Floats, labels: Floats, rows: StepRows) -> dict[str, Any]:
    """The metrics of all steps of some responses. values, labels: (N,), response by response."""
    counts = rows.numbers("ends")
    metrics = step_metrics(torch.from_numpy(values), torch.from_numpy(labels))
    return {
        **to_numbers(list(metrics), torch.stack(list(metrics.values())).double()),
        **first_wrong_accuracy(values, labels, counts),
        "steps_per_response": float(counts.mean()),
    }
