"""Which engine trains a model, and where frozen models are held."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from denserl_cli.core.engine.base import Engine
from denserl_cli.core.engine.deepspeed_engine import DeepSpeedEngine
from denserl_cli.core.engine.deepspeed_setup import configuration
from denserl_cli.core.engine.frozen import (
    FrozenModel,
    LocalModel,
    OffloadedModel,
    ShardedModel,
    frozen_configuration,
)
from denserl_cli.core.engine.sharding import ShardedPlacement
from denserl_cli.core.engine.torch_engine import TorchEngine
from denserl_cli.core.errors import DenserlError
from denserl_cli.core.models.device import compute_dtype, device
from denserl_cli.core.models.placement import Placement, whole
from denserl_cli.core.system.distributed import world_size

if TYPE_CHECKING:
    from denserl_cli.core.recipe.schema import EngineConfig, Recipe


def uses_deepspeed(engine: EngineConfig) -> bool:
    """Whether a stage runs under DeepSpeed; with several processes it always does by default."""
    if engine.kind == "auto":
        offloads = engine.offload_optimizer or engine.offload_parameters
        return world_size() > 1 or (offloads and torch.cuda.is_available())
    return engine.kind == "deepspeed"


def check_engine(recipe: Recipe, engine: EngineConfig, field: str) -> None:
    """Check an engine's settings before anything is loaded.

    Args:
        recipe: Says whether there are adapters.
        engine: Of a stage.
        field: Name of the engine's settings in the recipe, for errors.

    Raises:
        DenserlError: The engine cannot do what they ask for.
    """
    if world_size() > 1 and engine.kind == "torch":
        raise DenserlError(
            f"{field}.kind=torch trains in one process, this job has {world_size()}",
            hint=f"set {field}.kind=deepspeed, or --processes 1",
        )
    if not uses_deepspeed(engine):
        return
    if recipe.lora is not None and recipe.lora.quantize and engine.zero_stage == 3:
        raise DenserlError(
            "ZeRO 3 does not spread weights that are packed into 4 bits",
            hint=f"set {field}.zero_stage=2, or lora.quantize=false",
        )


def make_engine(
    recipe: Recipe, engine: EngineConfig, model: Any, *, learning_rate: float, total_steps: int
) -> Engine:
    """The engine that trains a model.

    Args:
        recipe: Says the compute type and the optimizer's settings.
        engine: Of the stage.
        model: Of transformers; its parameters that require a gradient are trained.
        learning_rate: The highest, after the warm-up.
        total_steps: Optimizer steps of the schedule.
    """
    dtype = compute_dtype(recipe.model)
    if uses_deepspeed(engine):
        return DeepSpeedEngine(
            model,
            learning_rate=learning_rate,
            settings=recipe.optimizer,
            total_steps=total_steps,
            compute_dtype=dtype,
            engine=engine,
        )
    return TorchEngine(
        model,
        learning_rate=learning_rate,
        settings=recipe.optimizer,
        total_steps=total_steps,
        compute_dtype=dtype,
    )


def placement(
    recipe: Recipe, engine: EngineConfig | None, *, trained: bool, alone: bool = False
) -> Placement:
    """Where the weights of a model are put while it is loaded for `make_engine` or `freeze`.

    Args:
        recipe: Says the compute type, and whether adapters share the weights.
        engine: Of the stage; None keeps models whole in this process.
        trained: The model is trained; DeepSpeed makes its float32 masters of any type.
        alone: As for `freeze`.
    """
    dtype = compute_dtype(recipe.model)
    if engine is None or not uses_deepspeed(engine):
        return whole(recipe.model, trained=trained)
    if trained and engine.zero_stage == 3:
        return ShardedPlacement(dtype, configuration(engine, 0.0, dtype))
    if not trained and shards_frozen(recipe, engine, alone):
        return ShardedPlacement(dtype, frozen_configuration(engine))
    return Placement(dtype)


def shards_frozen(recipe: Recipe, engine: EngineConfig | None, alone: bool = False) -> bool:
    """Whether models that are not trained are spread over the processes."""
    if engine is None or alone or not uses_deepspeed(engine):
        return False
    zero3 = engine.zero_stage == 3
    if recipe.lora is not None:  # adapters share the weights with what is trained
        return zero3
    return world_size() > 1 and (zero3 if engine.shard_frozen is None else engine.shard_frozen)


def freeze(
    model: Any, recipe: Recipe, engine: EngineConfig | None = None, *, alone: bool = False
) -> FrozenModel:
    """Hold a model that is not trained where a stage's engine says: here, offloaded or sharded.

    Args:
        model: Of transformers, its weights frozen, on this process's device.
        recipe: Says the compute type, and whether adapters share the weights.
        engine: Of the stage; None keeps the model whole in this process.
        alone: The model is never sharded, because processes call it at different times.
    """
    dtype = compute_dtype(recipe.model)
    if engine is not None and shards_frozen(recipe, engine, alone):
        return ShardedModel(model, engine, dtype)
    if engine is None or recipe.lora is not None:  # what is trained shares the weights
        return LocalModel(model, dtype)
    if engine.offload_frozen and torch.cuda.is_available():  # else they are on the CPU already
        return OffloadedModel(model, dtype, device())
    return LocalModel(model, dtype)
