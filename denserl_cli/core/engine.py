"""One model in training: mixed precision, clipping, AdamW, the schedule, and all their state."""

from __future__ import annotations

import random
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from denserl_cli.core.recipe.schema import OptimizerConfig


class NonFiniteError(ArithmeticError):
    """A loss, gradient or reward is NaN or infinite; no weight was changed."""


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
        from transformers import get_cosine_with_min_lr_schedule_with_warmup

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
        self.schedule = get_cosine_with_min_lr_schedule_with_warmup(
            self.optimizer,
            num_warmup_steps=round(settings.warmup_ratio * total_steps),
            num_training_steps=total_steps,
            min_lr_rate=settings.min_lr_ratio,
        )
        self.loss = torch.zeros((), device=self.device)

    @property
    def learning_rate(self) -> float:
        """The rate of the next step."""
        return float(self.schedule.get_last_lr()[0])

    def autocast(self) -> AbstractContextManager[Any]:
        """Context for forward passes."""
        return autocast(self.device, self.compute_dtype)

    def backward(self, loss: Tensor) -> None:
        """Add this loss and its gradient to the accumulated ones."""
        loss.backward()
        self.loss = self.loss + loss.detach()

    def clip(self) -> Tensor:
        """Clip the accumulated gradient; returns its norm before.

        Raises NonFiniteError when that or the loss is NaN or infinite.
        """
        norm = nn.utils.clip_grad_norm_(self.parameters, self.clip_norm)
        for name, value in (("gradient norm", norm), ("loss", self.loss)):
            if not torch.isfinite(value):
                raise NonFiniteError(f"the {name} is {value:g}")
        return norm

    def step(self) -> Tensor:
        """Clip and update; returns the gradient norm before. Raises NonFiniteError as `clip`."""
        (norm,) = step(self)
        return norm

    def update(self) -> None:
        """Change the weights by the accumulated gradient, advance the schedule."""
        self.optimizer.step()
        self.schedule.step()
        self.discard()

    def discard(self) -> None:
        """Forget the accumulated loss and gradient."""
        self.optimizer.zero_grad(set_to_none=True)
        self.loss = torch.zeros((), device=self.device)

    def state(self) -> dict[str, Any]:
        """The weights that are trained, optimizer and schedule."""
        return {
            "model": {name: weight.detach() for name, weight in self.trained.items()},
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` returned."""
        with torch.no_grad():
            for name, weight in self.trained.items():
                weight.copy_(state["model"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])


def step(*engines: TorchEngine) -> list[Tensor]:
    """Clip and update every engine or, when one's gradient is not finite, none.

    Returns the gradient norms before clipping. Raises NonFiniteError before any weight is changed;
    the gradients are gone then.
    """
    try:
        norms = [engine.clip() for engine in engines]
    except NonFiniteError:
        for engine in engines:
            engine.discard()
        raise
    for engine in engines:
        engine.update()
    return norms


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Autocast to `dtype`; does nothing for float32."""
    return torch.autocast(device.type, dtype, enabled=dtype is not torch.float32)


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch on every device."""
    from accelerate.utils import set_seed

    set_seed(seed)


def random_state() -> dict[str, Any]:
    """The state of every global random generator, as plain values and tensors."""
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    version, internal, gauss = random.getstate()
    return {
        "python": [version, list(internal), gauss],
        "numpy": [
            kind,
            torch.from_numpy(np.asarray(keys, dtype=np.int64)),
            position,
            has_gauss,
            cached,
        ],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Take over what `random_state` returned."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
