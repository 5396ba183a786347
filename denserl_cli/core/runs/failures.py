"""What happens at numbers that are not finite, and when the memory runs out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils.memory import should_reduce_batch_size

from denserl_cli.core.engine.base import NonFiniteError
from denserl_cli.core.errors import DenserlError
from denserl_cli.core.recipe.fields import value_of
from denserl_cli.core.recipe.stages import STAGES
from denserl_cli.core.system.distributed import barrier, is_main_process
from denserl_cli.core.system.files import replaced_folder

if TYPE_CHECKING:
    from denserl_cli.core.observer import Observer
    from denserl_cli.core.recipe.schema import Recipe
    from denserl_cli.core.runs.folder import RunFolder

MOST_SKIPS = 10
"""Updates in a row that may be skipped: more are not the fault of single batches."""


class NonFiniteGuard:
    """Stops at numbers that are NaN or infinite, or skips and counts those updates.

    Which of the two is the recipe's `run.nonfinite`.

    Attributes:
        total: updates skipped since the start of the stage.
        in_a_row: updates skipped since the last good one.
    """

    def __init__(self, stage: str, run: RunFolder, observer: Observer) -> None:
        self.stage, self.run, self.observer = stage, run, observer
        self.skips = run.recipe.run.nonfinite == "skip"
        self.total = self.in_a_row = 0

    @contextmanager
    def update(self, step: int, batch: Callable[[], Mapping[str, Any]]) -> Iterator[None]:
        """Skip the block, one update, when it raises NonFiniteError.

        Args:
            step: the step of the update.
            batch: gives what the update works on, to be kept when the stage stops.

        Raises:
            DenserlError: the recipe does not skip, or `MOST_SKIPS` updates in a row were skipped.
        """
        try:
            yield
        except NonFiniteError as error:
            self.caught(step, error, batch)
        else:
            self.in_a_row = 0

    def caught(
        self, step: int, error: NonFiniteError, batch: Callable[[], Mapping[str, Any]]
    ) -> None:
        """Count an update that is skipped, or write its batch and raise DenserlError."""
        if self.skips and self.in_a_row < MOST_SKIPS:
            self.total += 1
            self.in_a_row += 1
            self.observer.notice(f"{self.stage} step {step}: {error}; its update is skipped")
            return
        folder = self.run.path / "nonfinite" / f"{self.stage}-{step:08d}"
        if is_main_process():
            with replaced_folder(folder) as aside:
                torch.save(dict(batch()), aside / "batch.pt")
        barrier()  # an error in one process ends the others
        before = f" after {self.in_a_row} skipped updates in a row" if self.in_a_row else ""
        raise DenserlError(
            f"{self.stage} stopped at step {step}{before}: {error}; the batch is in {folder}",
            hint="look at the batch; the last checkpoint is intact: go on with --resume, and with "
            "--set run.nonfinite=skip to leave such updates out; a lower learning rate needs "
            "--fresh or another --out",
        ) from error

    def metrics(self) -> dict[str, int]:
        """What metrics.jsonl gets."""
        return {"skipped_updates": self.total} if self.skips else {}

    def state(self) -> dict[str, int]:
        """The counts, for a checkpoint."""
        return {"total": self.total, "in_a_row": self.in_a_row}

    def restore(self, state: Mapping[str, int]) -> None:
        """Go on from what `state` returned."""
        self.total, self.in_a_row = state["total"], state["in_a_row"]


@contextmanager
def memory_advice(stage: str, recipe: Recipe) -> Iterator[None]:
    """Turn running out of memory into a DenserlError that names the settings to lower."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        reason = str(error).strip().partition("\n")[0] or "no memory left"
        raise DenserlError(
            f"{stage} ran out of memory: {reason}", hint=_advice(stage, recipe)
        ) from error


def _is_out_of_memory(error: Exception) -> bool:
    kinds = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or should_reduce_batch_size(error)


def _advice(stage: str, recipe: Recipe) -> str:
    lower = [f"{field} ({value_of(recipe, field)})" for field in STAGES[stage].memory_fields]
    advice = f"lower {', '.join(lower)}"
    if STAGES[stage].subject:
        return advice
    if STAGES[stage].trains:
        if not recipe.model.gradient_checkpointing:
            advice += "; set model.gradient_checkpointing=true (false)"
        if recipe.lora is None:
            advice += "; train adapters instead of all weights: lora={} (null)"
    return f"{advice}. With other micro batches --resume goes on, anything else starts anew"
