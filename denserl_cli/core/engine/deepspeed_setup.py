"""DeepSpeed set up: its import, its configuration, its engine around a model."""

from __future__ import annotations

import io
import logging
import os
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from denserl_cli.core.errors import DenserlError
from denserl_cli.core.system.distributed import join_alone, world_size

if TYPE_CHECKING:
    from denserl_cli.core.recipe.schema import EngineConfig

T = TypeVar("T")


class FunctionModule(nn.Module):
    """Calls functions of a model, so that ZeRO 3 counts each call as one pass over the weights."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[..., T], *inputs: Any, **options: Any) -> T:
        """`function` of the model."""
        return function(self.model, *inputs, **options)


def configuration(
    engine: EngineConfig, clip_norm: float, compute_dtype: torch.dtype
) -> dict[str, Any]:
    """DeepSpeed's configuration; the recipe's `deepspeed` mapping overrides it.

    Args:
        engine: Of the stage.
        clip_norm: Largest norm of the gradient.
        compute_dtype: bfloat16 or float32.
    """
    zero: dict[str, Any] = {"stage": engine.zero_stage}
    to_cpu = {"device": "cpu", "pin_memory": True}
    if engine.offload_optimizer and torch.cuda.is_available():  # else it is there already
        zero["offload_optimizer"] = to_cpu
    if engine.offload_parameters and torch.cuda.is_available():
        zero["offload_param"] = to_cpu
    made: dict[str, Any] = {
        # the caller splits batches and says which backward pass is the last one
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": clip_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": sys.maxsize,
        "bf16": {"enabled": compute_dtype is torch.bfloat16},
        "data_types": {
            "grad_accum_dtype": "fp32" if engine.gradient_dtype == "float32" else "bf16"
        },
    }
    return _laid_over(made, engine.deepspeed)


def import_deepspeed() -> Any:
    """Import DeepSpeed, on the CPU where there is no GPU, without its output on stdout."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed
    except ImportError as error:
        raise DenserlError(
            "DeepSpeed is not installed", hint="pip install deepspeed, or set engine.kind=torch"
        ) from error
    from deepspeed.utils import logger

    if not torch.cuda.is_available():  # otherwise it compiles a collective that is never called
        deepspeed.ops.__compatible_ops__ = {}
    logger.setLevel(logging.ERROR)
    for handler in logger.handlers:
        if type(handler) is logging.StreamHandler:  # its own
            handler.stream = sys.stderr  # setStream would flush the old one, which may be closed
    return deepspeed


def initialize(model: nn.Module, made: dict[str, Any], **options: Any) -> Any:
    """DeepSpeed's engine around a model, without its output on stdout."""
    deepspeed = import_deepspeed()
    if world_size() == 1:
        join_alone()
    with redirect_stdout(io.StringIO()):
        engine, *_ = deepspeed.initialize(model=FunctionModule(model), config=made, **options)
    return engine


def _laid_over(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Merge two mappings; the second one wins."""
    merged = dict(base)
    for key, value in over.items():
        inner = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _laid_over(merged[key], value) if inner else value
    return merged
