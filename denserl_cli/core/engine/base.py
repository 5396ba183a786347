"""The interface of engines, which train one model each, and what they share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from denserl_cli.core.recipe.schema import OptimizerConfig

T = TypeVar("T")


class NonFiniteError(ArithmeticError):
    """A loss, gradient or reward is NaN or infinite; no weight was changed."""


class Engine(Protocol):
    """Trains one model: mixed precision, clipping, AdamW, the schedule, and all their state.

    Gradients accumulate over `backward` calls until `step`. Where several processes train one
    model, each makes the same calls in the same order.
    """

    device: torch.device
    compute_dtype: torch.dtype

    @property
    def model(self) -> Any:
        """The model; sharded weights are in place only inside a call and `gathered`."""

    @property
    def learning_rate(self) -> float:
        """The rate of the next step."""

    def __call__(self, function: Callable[..., T], *inputs: Any, **options: Any) -> T:
        """`function(model, *inputs)` with the weights in place, in the compute type."""

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        """Accumulate a loss and its gradient; `last` says that `step` comes next."""

    def check(self) -> None:
        """Raise NonFiniteError when the accumulated loss or gradient is not finite."""

    def update(self) -> Tensor:
        """Update the weights; returns the gradient norm before clipping."""

    def discard(self) -> None:
        """Drop the accumulated loss and gradient."""

    def gathered(self) -> AbstractContextManager[Any]:
        """Yield the model with all weights in place, on every process, for inference."""

    def weights(self) -> dict[str, Any] | None:
        """All weights by name, the trained ones in float32; None but in the first process."""

    def state(self) -> dict[str, Any]:
        """Everything that resuming needs and `save_shards` does not write."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` returned."""

    def save_shards(self, folder: Path) -> None:
        """Write this process's part of weights and optimizer."""

    def load_shards(self, folder: Path) -> None:
        """Read what `save_shards` wrote."""


def step(*engines: Engine) -> list[Tensor]:
    """Clip and update all engines or, when the numbers of one are not finite, none.

    Returns:
        The gradient norms before clipping.

    Raises:
        NonFiniteError: No weight was changed; the accumulated gradients are dropped.
    """
    try:
        for engine in engines:
            engine.check()
    except NonFiniteError:
        for engine in engines:
            engine.discard()
        raise
    return [engine.update() for engine in engines]


def cosine_schedule(
    optimizer: torch.optim.Optimizer, settings: OptimizerConfig, total_steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up, then a cosine down to the recipe's smallest rate."""
    from transformers import get_cosine_with_min_lr_schedule_with_warmup

    return get_cosine_with_min_lr_schedule_with_warmup(
        optimizer,
        num_warmup_steps=round(settings.warmup_ratio * total_steps),
        num_training_steps=total_steps,
        min_lr_rate=settings.min_lr_ratio,
    )
