"""The device and the types that models compute in."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from denserl_cli.core.recipe.schema import ModelConfig


def device() -> torch.device:
    """The device of this process: a CUDA GPU, or the CPU."""
    from accelerate import PartialState

    found = PartialState().device
    return found if found.type == "cuda" else torch.device("cpu")


def compute_dtype(model: ModelConfig) -> torch.dtype:
    """The recipe's compute type; `auto` is bfloat16 where the hardware has it."""
    if model.dtype == "auto":
        fast = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if fast else torch.float32
    return torch.bfloat16 if model.dtype == "bfloat16" else torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Autocast to `dtype`; does nothing for float32."""
    return torch.autocast(device.type, dtype, enabled=dtype is not torch.float32)
