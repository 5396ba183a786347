"""Which engine trains a model, and where frozen models live."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from denserl_cli.core.engine.base import Engine
from denserl_cli.core.engine.deepspeed_engine import DeepSpeedEngine
from denserl_cli.core.engine.frozen import Sharded
from denserl_cli.core.engine.torch_engine import TorchEngine
from denserl_cli.core.errors import DenserlError
from denserl_cli.core.models.device import compute_dtype, device
from denserl_cli.core.system.distributed import world_size

if TYPE_CHECKING:
    from denserl_cli.core.recipe.schema import EngineConfig, Recipe
    from denserl_cli.core.scoring.scorer import Scorer


def uses_deepspeed(engine: EngineConfig) -> bool:
    """Whether a stage runs under DeepSpeed: several processes always do."""
    if engine.kind == "auto":
        offloads = engine.offload_optimizer or engine.offload_parameters
        return world_size() > 1 or (offloads and torch.cuda.is_available())
    return engine.kind == "deepspeed"


def check_engine(recipe: Recipe, engine: EngineConfig, field: str) -> None:
    """Raise DenserlError for what an engine cannot do, before anything is loaded."""
    if world_size() > 1 and engine.kind == "torch":
        raise DenserlError(
            f"{field}.kind=torch trains in one process, this job has {world_size()}",
            hint=f"set {field}.kind=deepspeed, or --processes 1",
        )
    if not uses_deepspeed(engine):
        return
    if recipe.lora is not None and engine.zero_stage == 3:
        raise DenserlError(
            "adapters share one frozen body, whose weights ZeRO 3 would shard once for each model",
            hint=f"set {field}.zero_stage=2",
        )


def make_engine(
    recipe: Recipe, engine: EngineConfig, model: Any, *, learning_rate: float, total_steps: int
) -> Engine:
    """The engine that trains a model."""
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


def shard_frozen_models(scorer: Scorer, recipe: Recipe, engine: EngineConfig) -> None:
    """Shard a scorer's frozen models over the processes, or let them rest, as the recipe says."""
    wanted = engine.zero_stage == 3 if engine.shard_frozen is None else engine.shard_frozen
    wanted &= recipe.lora is None  # adapters share the weights
    if world_size() == 1 or not wanted or not uses_deepspeed(engine):
        if engine.offload_frozen and torch.cuda.is_available():  # else they are there already
            scorer.offload(device())
        return
    for name in ("reference", "reward_model"):
        model, dtype = getattr(scorer, name), compute_dtype(recipe.model)
        if isinstance(model, nn.Module):  # and not one that reads texts of its own
            setattr(scorer, name, Sharded(model, engine, dtype))
