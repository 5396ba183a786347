"""Training of one model in one process, in plain torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from denserl_cli.core.engine.base import NonFiniteError, T, cosine_schedule
from denserl_cli.core.errors import DenserlError
from denserl_cli.core.models.device import autocast
from denserl_cli.core.recipe.schema import OptimizerConfig


class TorchEngine:
    """Trains one model in one process; float32 weights, compute type by autocast.

    Gradients accumulate over `backward` calls until `step`.
    """

    def __init__(
        self,
        model: Any,
        *,
        learning_rate: float,
        settings: OptimizerConfig,
        total_steps: int,
        compute_dtype: torch.dtype,
    ) -> None:
        self.model = model
        self.compute_dtype = compute_dtype
        self.clip_norm = settings.clip_norm
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.parameters = list(self.trained.values())
        self.device = self.parameters[0].device
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=learning_rate,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
            fused=True,
        )
        self.schedule = cosine_schedule(self.optimizer, settings, total_steps)
        self.loss = torch.zeros((), device=self.device)

    @property
    def learning_rate(self) -> float:
        """The rate of the next step."""
        return float(self.schedule.get_last_lr()[0])

    def __call__(self, function: Callable[..., T], *inputs: Any, **options: Any) -> T:
        """`function(model, *inputs)` in the compute type."""
        with autocast(self.device, self.compute_dtype):
            return function(self.model, *inputs, **options)

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        """Accumulate a loss and its gradient; `last` makes no difference here."""
        loss.backward()
        self.loss = self.loss + loss.detach()

    def check(self) -> None:
        """Clip the accumulated gradient; NonFiniteError when it or the loss is not finite."""
        self.norm = nn.utils.clip_grad_norm_(self.parameters, self.clip_norm)
        for name, value in (("gradient norm", self.norm), ("loss", self.loss)):
            if not torch.isfinite(value):
                raise NonFiniteError(f"the {name} is {value:g}")

    def update(self) -> Tensor:
        """Update the weights by the accumulated gradient; returns its norm before clipping."""
        self.optimizer.step()
        self.schedule.step()
        self.discard()
        return self.norm

    def discard(self) -> None:
        """Drop the accumulated loss and gradient."""
        self.optimizer.zero_grad(set_to_none=True)
        self.loss = torch.zeros((), device=self.device)

    @contextmanager
    def gathered(self) -> Iterator[Any]:
        """Yield the model with all weights in place, for inference."""
        yield self.model

    def weights(self) -> dict[str, Any]:
        """All weights by name, the trained ones in float32."""
        return dict(self.model.state_dict())

    def state(self) -> dict[str, Any]:
        """The trained weights, the optimizer and the schedule."""
        return {
            "model": {name: weight.detach() for name, weight in self.trained.items()},
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` returned. Raises DenserlError for a checkpoint of DeepSpeed."""
        if "model" not in state:
            raise DenserlError(
                f"the checkpoint's shards are of {state['processes']} processes under ZeRO "
                f"{state['zero_stage']}, this job is one process without DeepSpeed",
                hint="go on in two processes or more",
            )
        with torch.no_grad():
            for name, weight in self.trained.items():
                weight.copy_(state["model"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])

    def save_shards(self, folder: Path) -> None:
        """Do nothing: one process has no shards, `state` is everything."""

    def load_shards(self, folder: Path) -> None:
        """Do nothing: one process has no shards, `restore` was everything."""
