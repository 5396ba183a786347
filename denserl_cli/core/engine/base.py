"""One model in training: mixed precision, clipping, AdamW, the schedule, and all their state."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from denserl_cli.core.errors import DenserlError
from denserl_cli.core.recipe.schema import OptimizerConfig

T = TypeVar("T")


class NonFiniteError(ArithmeticError):
    """A loss, gradient or reward is NaN or infinite; no weight was changed."""


class Engine(Protocol):
    """One model in training, wherever its weights are.

    Gradients accumulate over `backward` calls until `step`. Where several processes train one
    model, each makes the same calls in the same order.
    """

    device: torch.device
    compute_dtype: torch.dtype

    @property
    def model(self) -> Any:
        """The model; where weights are sharded they are there only inside `()` and `gathered`."""

    @property
    def learning_rate(self) -> float:
        """The rate of the next step."""

    def __call__(self, function: Callable[..., T], *inputs: Any, **options: Any) -> T:
        """`function(model, *inputs)` with the weights at hand, in the compute type."""

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        """Add this loss and its gradient to the accumulated ones; `last`: `step` comes next."""

    def check(self) -> None:
        """Raise NonFiniteError when what was accumulated is not finite."""

    def update(self) -> Tensor:
        """Change the weights; returns the gradient norm before clipping."""

    def discard(self) -> None:
        """Forget the accumulated loss and gradient."""

    def gathered(self) -> AbstractContextManager[Any]:
        """Yield the model with all weights in place, on every process, for inference."""

    def state(self) -> dict[str, Any]:
        """Everything that resuming needs and `save_shards` does not write."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` returned."""

    def save_shards(self, folder: Path) -> None:
        """Write this process's part of weights and optimizer."""

    def load_shards(self, folder: Path) -> None:
        """Take over what `save_shards` wrote."""


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
        """Add this loss and its gradient to the accumulated ones; `last`: `step` comes next."""
        loss.backward()
        self.loss = self.loss + loss.detach()

    def check(self) -> None:
        """Clip the accumulated gradient; NonFiniteError when it or the loss is not finite."""
        self.norm = nn.utils.clip_grad_norm_(self.parameters, self.clip_norm)
        for name, value in (("gradient norm", self.norm), ("loss", self.loss)):
            if not torch.isfinite(value):
                raise NonFiniteError(f"the {name} is {value:g}")

    def update(self) -> Tensor:
        """Change the weights by the accumulated gradient; returns its norm before clipping."""
        self.optimizer.step()
        self.schedule.step()
        self.discard()
        return self.norm

    def discard(self) -> None:
        """Forget the accumulated loss and gradient."""
        self.optimizer.zero_grad(set_to_none=True)
        self.loss = torch.zeros((), device=self.device)

    @contextmanager
    def gathered(self) -> Iterator[Any]:
        """Yield the model with all weights in place, for inference."""
        yield self.model

    def state(self) -> dict[str, Any]:
        """The weights that are trained, optimizer and schedule."""
        return {
            "model": {name: weight.detach() for name, weight in self.trained.items()},
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` returned. Raises DenserlError for a checkpoint of DeepSpeed's."""
        if "model" not in state:
            raise DenserlError(
                f"the checkpoint's shards are of {state['processes']} processes under ZeRO "
                f"{state['zero_stage']}, this job is one process without DeepSpeed",
                hint="go on with as many processes and the engine as before",
            )
        with torch.no_grad():
            for name, weight in self.trained.items():
                weight.copy_(state["model"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])

    def save_shards(self, folder: Path) -> None:
        """One process has no shards: `state` is everything."""

    def load_shards(self, folder: Path) -> None:
        """One process has no shards: `restore` was everything."""


class Frozen:
    """A model that is not trained, in the compute type; what `Engine` and it share reads it."""

    def __init__(self, model: Any, compute_dtype: torch.dtype) -> None:
        self.model, self.compute_dtype = model, compute_dtype
        self.device = model.device

    def __call__(self, function: Callable[..., T], *inputs: Any, **options: Any) -> T:
        """`function(model, *inputs)` in the compute type."""
        with autocast(self.device, self.compute_dtype):
            return function(self.model, *inputs, **options)

    @contextmanager
    def gathered(self) -> Iterator[Any]:
        """Yield the model."""
        yield self.model


class Resting:
    """Frozen models whose weights wait in the CPU's memory until somebody needs them."""

    def __init__(self, models: Iterable[nn.Module], device: torch.device) -> None:
        held = [w for model in models for w in (*model.parameters(), *model.buffers())]
        self.weights = list({id(weight): weight for weight in held}.values())
        self.kept = [weight.detach().cpu() for weight in self.weights]
        self.device = device
        self._rest()

    @contextmanager
    def at_hand(self) -> Iterator[None]:
        """Copies of the weights on the device for the while."""
        for weight, kept in zip(self.weights, self.kept, strict=True):
            weight.data = torch.empty_like(kept, device=self.device).copy_(kept)
        try:
            yield
        finally:
            self._rest()

    def _rest(self) -> None:
        for weight, kept in zip(self.weights, self.kept, strict=True):
            weight.data = kept


def step(*engines: Engine) -> list[Tensor]:
    """Clip and update every engine or, when one's numbers are not finite, none.

    Returns the gradient norms before clipping. Raises NonFiniteError before any weight is changed;
    the gradients are gone then.
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
    """Linear warm-up, then a cosine down to the recipe's least rate."""
    from transformers import get_cosine_with_min_lr_schedule_with_warmup

    return get_cosine_with_min_lr_schedule_with_warmup(
        optimizer,
        num_warmup_steps=round(settings.warmup_ratio * total_steps),
        num_training_steps=total_steps,
        min_lr_rate=settings.min_lr_ratio,
    )


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
