"""Models that are not trained: whole on the device, offloaded to the CPU's memory, or sharded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import torch

from denserl_cli.core.engine.base import T
from denserl_cli.core.engine.deepspeed_setup import configuration, initialize
from denserl_cli.core.models.device import autocast

if TYPE_CHECKING:
    from denserl_cli.core.recipe.schema import EngineConfig


class FrozenModel(Protocol):
    """A model that is not trained, wherever its weights are."""

    @property
    def device(self) -> torch.device:
        """Where its forward passes run."""

    def __call__(self, function: Callable[..., T], *inputs: Any, **options: Any) -> T:
        """`function(model, *inputs)` with the weights in place, in the compute type."""

    def on_device(self) -> AbstractContextManager[None]:
        """Hold the weights on the device for all calls inside."""


class LocalModel:
    """A frozen model that this process holds whole, on its device.

    It has `model`, `device`, `compute_dtype` and `gathered` as `Engine` does, so that responses can
    be sampled from either.
    """

    def __init__(self, model: Any, compute_dtype: torch.dtype) -> None:
        self.model, self.compute_dtype = model, compute_dtype
        self.device = model.device

    def __call__(self, function: Callable[..., T], *inputs: Any, **options: Any) -> T:
        """`function(model, *inputs)` in the compute type."""
        with autocast(self.device, self.compute_dtype):
            return function(self.model, *inputs, **options)

    def on_device(self) -> AbstractContextManager[None]:
        """Do nothing: the weights are on the device."""
        return nullcontext()

    @contextmanager
    def gathered(self) -> Iterator[Any]:
        """Yield the model."""
        yield self.model


class OffloadedModel(LocalModel):
    """A frozen model whose weights stay in the CPU's memory except inside `on_device`."""

    def __init__(self, model: Any, compute_dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(model, compute_dtype)
        self.device = device
        self.weights = [*model.parameters(), *model.buffers()]
        self.kept = [weight.detach().cpu() for weight in self.weights]
        self._offload()

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Copy the weights to the device; the copies are dropped at the end."""
        for weight, kept in zip(self.weights, self.kept, strict=True):
            weight.data = torch.empty_like(kept, device=self.device).copy_(kept)
        try:
            yield
        finally:
            self._offload()

    def _offload(self) -> None:
        for weight, kept in zip(self.weights, self.kept, strict=True):
            weight.data = kept


class ShardedModel:
    """A frozen model whose weights are sharded over the processes by ZeRO 3."""

    def __init__(self, model: Any, engine: EngineConfig, compute_dtype: torch.dtype) -> None:
        self.config, self.compute_dtype = model.config, compute_dtype
        self.engine = initialize(model, frozen_configuration(engine))

    @property
    def device(self) -> torch.device:
        """Where its forward passes run."""
        return self.engine.device

    def __call__(self, function: Callable[..., T], *inputs: Any, **options: Any) -> T:
        """`function(model, *inputs)` with the weights gathered layer by layer."""
        with autocast(self.device, self.compute_dtype):
            return self.engine(function, *inputs, **options)

    def on_device(self) -> AbstractContextManager[None]:
        """Do nothing: each layer is gathered when it is used."""
        return nullcontext()


def frozen_configuration(engine: EngineConfig) -> dict[str, Any]:
    """DeepSpeed's configuration for a model that ZeRO 3 shards without training it.

    Args:
        engine: Of the stage.
    """
    offload = engine.offload_parameters or engine.offload_frozen
    frozen = replace(engine, zero_stage=3, offload_optimizer=False, offload_parameters=offload)
    # DeepSpeed's bfloat16 would cast all weights; so each keeps its type, and a head is float32
    return configuration(frozen, 0.0, torch.float32)
