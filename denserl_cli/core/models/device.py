"""The device and the types that models compute in."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Literal

import torch

from denserl_cli.core.errors import DenserlError
from denserl_cli.core.precision import bfloat16_is_fast
from denserl_cli.core.system.hub import readable_errors

if TYPE_CHECKING:
    from denserl_cli.core.recipe.schema import ModelConfig


def device() -> torch.device:
    """The device of this process: a CUDA GPU, or the CPU."""
    from accelerate import PartialState

    found = PartialState().device
    return found if found.type == "cuda" else torch.device("cpu")


WIDE = 256
"""Hidden size from which bfloat16 pays on a CPU that is fast at it."""


def settled_dtype(model: ModelConfig) -> Literal["float32", "bfloat16"]:
    """What `model.dtype` is on this machine; on a CPU `auto` is decided by a measurement.

    It takes a fast CPU and a model of at least `WIDE`: in small ones casts cost more than they
    save.
    """
    if model.dtype == "auto" and not torch.cuda.is_available():
        return "bfloat16" if _hidden_size(model) >= WIDE and bfloat16_is_fast() else "float32"
    return usual_dtype(model)


def usual_dtype(model: ModelConfig) -> Literal["float32", "bfloat16"]:
    """The name of `compute_dtype`."""
    return "bfloat16" if compute_dtype(model) is torch.bfloat16 else "float32"


def _hidden_size(model: ModelConfig) -> int:
    """That of a model's configuration; 0 where it cannot be read, which loading will tell."""
    from transformers import AutoConfig

    try:
        with readable_errors(model.path, "starting model"):
            config = AutoConfig.from_pretrained(
                model.path, revision=model.revision, trust_remote_code=False
            )
    except DenserlError:
        return 0
    return getattr(config.get_text_config(), "hidden_size", 0)


def compute_dtype(model: ModelConfig) -> torch.dtype:
    """The compute type of a settled recipe; `auto` is bfloat16 on GPUs that have it."""
    if model.dtype == "auto":
        fast = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if fast else torch.float32
    return torch.bfloat16 if model.dtype == "bfloat16" else torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Autocast to `dtype`; does nothing for float32."""
    return torch.autocast(device.type, dtype, enabled=dtype is not torch.float32)
