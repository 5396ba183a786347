"""Which attention kernel a model computes with, in training and while it samples."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from denserl_cli.core.errors import DenserlError
from denserl_cli.core.models.device import compute_dtype

if TYPE_CHECKING:
    from denserl_cli.core.recipe.schema import ModelConfig

_SUPPORT = {"flash_attention_2": "_supports_flash_attn", "sdpa": "_supports_sdpa"}


def attention_kernel(model: ModelConfig, kind: Any = None) -> str:
    """The attention kernel to ask transformers for.

    `auto` is FlashAttention 2 where it is installed and computes in the recipe's type, else SDPA,
    and eager for a model that has neither.

    Args:
        model: Of the recipe.
        kind: transformers' class of the model; None: one that has every kernel.

    Raises:
        DenserlError: The recipe names a kernel that is not installed or that the class lacks.
    """
    from transformers.utils import is_flash_attn_2_available
    from transformers.utils.import_utils import is_kernels_available

    installed = is_flash_attn_2_available()
    asked = model.attention
    if asked == "auto":
        usable = installed and compute_dtype(model) is torch.bfloat16
        wanted = ("flash_attention_2", "sdpa") if usable else ("sdpa",)
        return next((name for name in wanted if _has(kind, name)), "eager")
    if asked == "flash_attention_2" and not (installed or is_kernels_available()):
        raise DenserlError(
            "model.attention is flash_attention_2, which is not installed here",
            hint="pip install flash-attn, or --set model.attention=auto",
        )
    if not _has(kind, asked):
        raise DenserlError(
            f"model.attention is {asked}, which transformers does not have for {kind.__name__}",
            hint="--set model.attention=auto takes what it has",
        )
    return asked


def _has(kind: Any, kernel: str) -> bool:
    if kind is None or kernel not in _SUPPORT:
        return True
    # transformers 5.19 says that it has SDPA for these, and leaves the cap out
    config = getattr(kind, "config_class", None)
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    return bool(getattr(kind, _SUPPORT[kernel], False)) and not (kernel == "sdpa" and capped)


def set_aside_cudnn(model: ModelConfig) -> None:
    """Keep SDPA from cuDNN's kernels unless the recipe wants them; does nothing without CUDA.

    cuDNN plans every new pair of rows and length for tens of milliseconds, and each decoded token
    is a new length.
    """
    if torch.cuda.is_available():
        torch.backends.cuda.enable_cudnn_sdp(model.cudnn_attention)


@contextmanager
def sampling_attention(model: Any) -> Iterator[None]:
    """Hold a model that trains with FlashAttention 2 at SDPA inside, to sample from.

    With left-padded rows FlashAttention 2 takes the padding out in every layer of every token, and
    the host waits for the device each time.

    Args:
        model: Of transformers.
    """
    config = model.config
    before = config._attn_implementation
    if before != "flash_attention_2" or not _has(type(model), "sdpa"):
        yield
        return
    config._attn_implementation = "sdpa"  # read in every forward pass; sets nested ones as well
    try:
        yield
    finally:
        config._attn_implementation = before
