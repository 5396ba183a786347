"""The attention of a sequence's last token in the last layer, from its query and all keys.

The layer's own kernel runs as ever; its inputs are kept for the one row that is wanted, so no layer
ever makes a matrix of attention weights. Queries and keys are those that the kernel gets: rotated,
normalised and grouped as the architecture does.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from denserl_cli.core.errors import DenserlError

if TYPE_CHECKING:
    from denserl_cli.core.data.batches import SequenceBatch

Call = dict[str, Any]
"""What an attention kernel was called with."""


@contextmanager
def attention_calls(model: Any) -> Iterator[Call]:
    """Keep what the kernel of a model's latest attention layer is called with, inside.

    Yields a mapping that holds it after a forward pass; it stays empty for an architecture whose
    attention does not go through transformers' interface.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as KERNELS

    name = model.config._attn_implementation
    kernel, latest = KERNELS.get(name), Call()

    def record(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any):  # type: ignore[no-untyped-def]
        latest.update(options, query=query, key=key, mask=mask)
        run = kernel or sys.modules[type(module).__module__].eager_attention_forward
        return run(module, query, key, value, mask, **options)

    KERNELS[name] = record
    try:
        yield latest
    finally:
        if kernel is None:
            del KERNELS[name]  # eager attention is each architecture's own
        else:
            KERNELS[name] = kernel


def attention_row(call: Call, positions: Tensor) -> Tensor:
    """Attention weights of one token of each sequence, as eager attention computes them.

    Args:
        call: Of `attention_calls`.
        positions: (B,) int64, of the token in each sequence.

    Returns:
        (B, S), float32, the mean of the heads; 0 after the token.
    """
    query, key, mask = call["query"], call["key"], call["mask"]
    count, heads, length, size = query.shape
    scaling, window = call.get("scaling"), call.get("sliding_window")
    softcap, sinks = call.get("softcap"), call.get("s_aux")
    rows, columns = (torch.arange(n, device=query.device) for n in (count, length))
    with torch.autocast(query.device.type, enabled=False):
        asked = query[rows, :, positions].float().reshape(count, key.shape[1], -1, size)
        logits = torch.einsum("bgrd,bgsd->bgrs", asked, key.float()).flatten(1, 2)
        logits = logits * (size**-0.5 if scaling is None else scaling)
        if softcap is not None:
            logits = torch.tanh(logits / softcap) * softcap
        seen = columns <= positions[:, None]
        if window:
            seen = seen & (columns > positions[:, None] - window)
        logits = logits.masked_fill(~seen[:, None], -torch.inf)
        if isinstance(mask, Tensor):
            row = mask[..., :length].expand(count, *mask.shape[1:3], length)[rows, :, positions]
            logits = (
                logits.masked_fill(~row, -torch.inf) if row.dtype is torch.bool else logits + row
            )
        if sinks is not None:  # what heads may pay to nothing
            extra = sinks.float().reshape(1, heads, 1).expand(count, heads, 1)
            logits = torch.cat([logits, extra], dim=2)
        return logits.softmax(2)[..., :length].mean(1)


def response_attention(call: Call, batch: SequenceBatch) -> Tensor:
    """How the last token of each response attends to the response's tokens, 1 in sum.

    Args:
        call: Of `attention_calls`, after a forward pass over the batch.
        batch: Of R sequences.

    Returns:
        (R, T), float32, 0 where masked.
    """
    lengths = batch.response_mask.sum(1)
    last = batch.response_positions[lengths.cumsum(0) - 1] % batch.input_ids.shape[1]
    weights = attention_row(call, last).flatten()[batch.response_positions]
    found = batch.window(weights)
    return found / found.sum(1, keepdim=True).clamp(min=torch.finfo(found.dtype).tiny)


@torch.no_grad()
def refuse_hidden_attention(model: Any, path: str) -> Tensor:
    """Raise DenserlError for a model whose attention weights cannot be computed.

    Returns a tensor, for ZeRO 3 takes nothing else from a pass.
    """
    ids = torch.arange(4, device=model.device).remainder(model.config.vocab_size)[None]
    with attention_calls(model) as call:
        model.base_model(input_ids=ids, use_cache=False)
    if not call:
        raise DenserlError(
            f"{path}: the attention of a {model.config.model_type} model cannot be read",
            hint="ppo.rewards: use differences or score in place of attention",
        )
    return ids
