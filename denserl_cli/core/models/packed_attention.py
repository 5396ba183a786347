"""Attention over packed sequences (`batches.Packing`): each token sees its own sequence alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from denserl_cli.core.data.batches import Packing

Attention = Callable[..., tuple[Tensor, Any]]


def packed_options(packing: Packing) -> dict[str, Any]:
    """What a model's body needs to read packed sequences."""
    register()
    mask = torch.empty(1, 1, 1, 1, device=packing.position_ids.device)
    return {
        "position_ids": packing.position_ids,
        "attention_mask": mask,  # four dimensions: transformers takes it as it is and makes none
        "packing": packing,
    }


@cache
def register() -> None:
    """Let transformers' kernels read packed sequences; without `packing` they are as before."""
    from transformers import AttentionInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    for name, attend in KERNELS.items():
        AttentionInterface.register(name, _wrapped(ALL_ATTENTION_FUNCTIONS[name], attend))


def _wrapped(kernel: Attention, attend: Attention) -> Attention:
    def attention(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        packing: Packing | None = None,
        **options: Any,
    ) -> tuple[Tensor, Any]:
        if packing is None:
            return kernel(module, query, key, value, attention_mask, **options)
        return attend(kernel, packing, module, query, key, value, **options)

    return attention


def one_by_one(
    kernel: Attention,
    packing: Packing,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention of each sequence by itself, with a kernel for whole sequences."""
    parts = [one.split(packing.own, dim=2) for one in (query, key, value)]
    outputs = []
    for number, (holder, own, whole) in enumerate(
        zip(packing.holders, packing.own, packing.whole, strict=True)
    ):
        inputs = [part[number] for part in parts]
        if own < whole:  # the causal kernel wants the prompt's queries, too
            prompts = [part[holder][:, :, : whole - own] for part in parts]
            inputs = [torch.cat(two, dim=2) for two in zip(prompts, inputs, strict=True)]
        mask = None
        if sliding_window is not None and whole > sliding_window:
            mask = torch.ones(whole, whole, dtype=torch.bool, device=query.device)
            mask = mask.tril().triu(1 - sliding_window)[None, None]
        output, _ = kernel(module, *inputs, mask, **options)
        outputs.append(output[:, whole - own :])
    return torch.cat(outputs, dim=1), None


def in_one_call(
    kernel: Attention,
    packing: Packing,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    **options: Any,
) -> tuple[Tensor, None]:
    """FlashAttention of all sequences; its causal mask counts from the end of queries and keys."""
    if packing.tokens is not None:
        key, value = (one.index_select(2, packing.tokens) for one in (key, value))
    return kernel(
        module,
        query,
        key,
        value,
        None,
        cu_seq_lens_q=packing.cumulative[0],
        cu_seq_lens_k=packing.cumulative[1],
        max_length_q=max(packing.own),
        max_length_k=max(packing.whole),
        **options,
    )


KERNELS = {"sdpa": one_by_one, "flash_attention_2": in_one_call}
"""How packed sequences are read, by the name of a kernel in transformers."""
