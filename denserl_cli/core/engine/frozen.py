"""Frozen models: called where they lie, offloaded to the CPU's memory, or sharded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from denserl_cli.core.engine.base import T
from denserl_cli.core.engine.deepspeed_engine import configuration, initialize
from denserl_cli.core.models.device import autocast

if TYPE_CHECKING:
    from denserl_cli.core.recipe.schema import EngineConfig


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


class CpuOffloaded:
    """Frozen models whose weights wait in the CPU's memory until somebody needs them."""

    def __init__(self, models: Iterable[nn.Module], device: torch.device) -> None:
        held = [w for model in models for w in (*model.parameters(), *model.buffers())]
        self.weights = list({id(weight): weight for weight in held}.values())
        self.kept = [weight.detach().cpu() for weight in self.weights]
        self.device = device
        self._offload()

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Copies of the weights on the device for the while."""
        for weight, kept in zip(self.weights, self.kept, strict=True):
            weight.data = torch.empty_like(kept, device=self.device).copy_(kept)
        try:
            yield
        finally:
            self._offload()

    def _offload(self) -> None:
        for weight, kept in zip(self.weights, self.kept, strict=True):
            weight.data = kept


class Sharded:
    """A frozen model whose weights are spread over the processes by ZeRO 3."""

    def __init__(self, model: Any, engine: EngineConfig, dtype: torch.dtype) -> None:
        away = engine.offload_parameters or engine.offload_frozen
        own = replace(engine, zero_stage=3, offload_optimizer=False, offload_parameters=away)
        made = configuration(own, 0.0, dtype)
        # of the frozen weights' own type: nothing is trained, so nothing needs masters
        made["bf16"] = {"enabled": next(model.parameters()).dtype is torch.bfloat16}
        self.config = model.config
        self.engine = initialize(model, made)

    @property
    def device(self) -> torch.device:
        """Where its forward passes run."""
        return self.engine.device

    def __call__(self, function: Callable[..., T], *inputs: Any, **options: Any) -> T:
        """`function(model, *inputs)` with the weights at hand."""
        return self.engine(function, *inputs, **options)


def called(model: Any, function: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
    """`function` of a model that may be sharded over processes."""
    if isinstance(model, Sharded):
        return model(function, *inputs, **options)
    return function(model, *inputs, **options)
