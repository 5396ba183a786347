"""Whether a model reads packed sequences, and whether it should."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch

from denserl_cli.core.data.batches import collate_sequences
from denserl_cli.core.data.packing import pack_sequences
from denserl_cli.core.models.causal_lm import hidden_states, tolerance
from denserl_cli.core.models.packed_attention import KERNELS

if TYPE_CHECKING:
    from denserl_cli.core.observer import Observer

_ROPE_BY_LENGTH = ("dynamic", "longrope")
"""Kinds of RoPE whose angles depend on the longest sequence of a batch."""
_PROMPTS = [[1, 2, 3, 4, 5], [6, 7], [1, 2, 3, 4, 5]]
_RESPONSES = [[8, 9, 10], [11, 12, 13, 14], [15, 16, 17, 18, 19]]


class Reader(Protocol):
    """An engine or a frozen model."""

    def __call__(self, function: Callable[..., Any], *inputs: Any) -> Any:
        """`function(model, *inputs)` with the weights in place."""


def wants_packing(model: Any, packing: bool | None) -> bool:
    """Whether sequences should be packed for a model.

    Args:
        model: Of transformers.
        packing: The recipe's `model.packing`; None: where it was found to be faster, on CPUs and
            under FlashAttention.
    """
    kernel = model.config._attn_implementation
    faster = model.device.type == "cpu" or kernel == "flash_attention_2"
    return kernel in KERNELS and (faster if packing is None else packing)


@torch.no_grad()
def can_pack(model: Any) -> bool:
    """Whether a model gives packed sequences the hidden states that it gives to padded ones.

    Attention that is not one of `KERNELS` or has a bias by distance (ALiBi), and layers with a
    state (hybrids), do not know where a packed sequence begins.

    Args:
        model: Of transformers; under autocast where it computes in half precision.
    """
    if not _may_pack(model):
        return False
    prompts, responses = (
        [[token % model.config.vocab_size for token in ids] for ids in lists]
        for lists in (_PROMPTS, _RESPONSES)
    )
    training = model.training
    model.eval()
    padded, packed = (
        hidden_states(model, batch)[batch.response_positions]
        for batch in (
            collate(prompts, responses, 0, model.device)
            for collate in (collate_sequences, pack_sequences)
        )
    )
    model.train(training)
    return bool((padded - packed).norm() <= tolerance(padded) * padded.norm())


def _may_pack(model: Any) -> bool:
    """Whether nothing in a model's configuration speaks against it that short texts do not show."""
    config = model.config
    layers = {*(getattr(config, "layer_types", None) or [])}
    by_length = any(name in str(getattr(config, "rope_parameters", "")) for name in _ROPE_BY_LENGTH)
    chunked = getattr(config, "attention_chunk_size", None)
    plain = layers <= {"full_attention", "sliding_attention"} and not chunked and not by_length
    return plain and model._supports_attention_backend


def packs(models: Sequence[Reader], packing: bool | None, observer: Observer) -> bool:
    """Whether models read their sequences packed; a notice says that they should and cannot.

    Args:
        models: Engines or frozen models that read the same batches.
        packing: The recipe's `model.packing`.
        observer: Told when sequences are padded because of the architecture.
    """
    if not all(one(wants_packing, packing) for one in models):
        return False
    able = all(one(can_pack) for one in models)  # the same in every process
    if not able:
        kind = models[0](lambda model: model.config.model_type)
        observer.notice(f"sequences are padded: a {kind} model cannot read them packed")
    return able
