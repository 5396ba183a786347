"""Whether a model reads packed sequences, and whether it should."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from denserl_cli.core.data.batches import collate_sequences
from denserl_cli.core.data.packing import pack_sequences
from denserl_cli.core.models.causal_lm import hidden_states
from denserl_cli.core.models.load_checks import tolerance
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
    prompts, responses = (
        [[token % model.config.vocab_size for token in ids] for ids in lists]
        for lists in (_PROMPTS, _RESPONSES)
    )
    training, may_pack = model.training, _may_pack(model)
    model.eval()
    states = []
    for collate in (collate_sequences, pack_sequences) if may_pack else (collate_sequences,):
        batch = collate(prompts, responses, 0, model.device)
        states.append(hidden_states(model, batch)[batch.response_positions])
    model.train(training)
    padded, last = states[0], states[-1]
    return may_pack and bool((padded - last).norm() <= tolerance(padded) * padded.norm())


def _may_pack(model: Any) -> bool:
    """Whether nothing in a model's configuration speaks against it that short texts do not show."""
    config = model.config
    layers = {*(getattr(config, "layer_types", None) or [])}
    by_length = any(name in str(getattr(config, "rope_parameters", "")) for name in _ROPE_BY_LENGTH)
    chunked = getattr(config, "attention_chunk_size", None)
    plain = layers <= {"full_attention", "sliding_attention"} and not chunked and not by_length
    known = config._attn_implementation in KERNELS and model._supports_attention_backend
    return plain and known


def packs(models: Sequence[Reader], packing: bool | None, observer: Observer) -> bool:
    """Whether models read their sequences packed; a notice says that they should and cannot.

    Args:
        models: Engines or frozen models that read the same batches.
        packing: The recipe's `model.packing`.
        observer: Told when sequences are padded because of the architecture.
    """
    if packing is False:
        return False
    verdicts = [one(_verdict, packing).tolist() for one in models]  # the same in every process
    wanted, able = (all(parts) for parts in zip(*verdicts, strict=True))
    if wanted and not able:
        observer.notice("sequences are padded: this architecture cannot read them packed")
    return wanted and able


def _verdict(model: Any, packing: bool | None) -> Tensor:
    """(2,) bool: whether packing is wanted, and possible; a tensor, for ZeRO 3 takes nothing else.

    The model is called in any case: ZeRO 3 counts this as a pass over its weights.
    """
    return torch.tensor([wants_packing(model, packing), can_pack(model)])
