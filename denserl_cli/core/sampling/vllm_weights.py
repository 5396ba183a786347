"""The policy's weights as a vLLM takes them: by checkpoint name, bucket by bucket."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from denserl_cli.core.engine.base import Engine
    from denserl_cli.core.engine.frozen import LocalModel

BUCKET_BYTES = 2**29
"""Weights that travel together, at most, but for a weight that alone is larger."""


class _Weight(NamedTuple):
    """A weight to send: its name, what must be in place to compute it, and how."""

    name: str
    parameter: Tensor
    value: Callable[[], Tensor]


@torch.no_grad()
def weight_buckets(
    policy: Engine | LocalModel, dtype: torch.dtype, limit: int = BUCKET_BYTES
) -> Iterator[dict[str, Tensor]]:
    """Yield all weights of the policy, adapters merged, under the names of its checkpoint.

    Under ZeRO 3 a bucket's weights are gathered while it is made, and never the whole model: every
    process goes through all buckets at the same time.

    Args:
        policy: In training or frozen.
        dtype: Of what is yielded.
        limit: Bytes of a bucket, at most, unless one weight has more.
    """
    from transformers.core_model_loading import revert_weight_conversion

    model = policy.model
    for weights in _grouped(_weights(model), limit // dtype.itemsize):
        with _in_place([weight.parameter for weight in weights]):
            bucket = {
                weight.name: weight.value().detach().to(dtype, copy=True) for weight in weights
            }
        yield revert_weight_conversion(model, bucket)


def _weights(model: Any) -> list[_Weight]:
    """Every weight and lasting buffer of a model, adapters in their layer's.

    A tied head is sent as well: on a CPU vLLM keeps a packed copy of it, which an update of the
    embedding alone leaves as it was, without a word.
    """
    from peft.tuners.lora import LoraLayer

    adapted = {name: m for name, m in model.named_modules() if isinstance(m, LoraLayer)}
    lasting = model.state_dict().keys()
    found = []
    for name, weight in model.named_parameters(remove_duplicate=False):
        layer, _, kind = name.partition(".base_layer.")
        if layer in adapted and kind == "weight":
            found.append(_Weight(f"{layer}.weight", weight, partial(_merged, adapted[layer])))
        elif layer in adapted and kind:
            found.append(_Weight(f"{layer}.{kind}", weight, partial(_as_it_is, weight)))
        elif not any(part.startswith("lora_") for part in name.split(".")):
            found.append(_Weight(name, weight, partial(_as_it_is, weight)))
    for name, buffer in model.named_buffers():
        if name in lasting:
            found.append(_Weight(name, buffer, partial(_as_it_is, buffer)))
    return found


def _as_it_is(weight: Tensor) -> Tensor:
    return weight


def _merged(layer: Any) -> Tensor:
    """The weight of a layer with its adapters added, in float32 also where it is held in 4 bits."""
    from peft.utils.integrations import dequantize_module_weight

    weight = dequantize_module_weight(layer.get_base_layer()).float()
    for adapter in layer.active_adapters:
        weight = weight + layer.get_delta_weight(adapter).float()
    return weight


def _grouped(weights: list[_Weight], limit: int) -> Iterator[list[_Weight]]:
    """Neighbours together, until a group would have more than `limit` numbers."""
    group: list[_Weight] = []
    size = 0
    for weight in weights:
        numbers = getattr(weight.parameter, "ds_numel", weight.parameter.numel())
        if group and size + numbers > limit:
            yield group
            group, size = [], 0
        group.append(weight)
        size += numbers
    if group:
        yield group


def _in_place(weights: list[Any]) -> AbstractContextManager[Any]:
    """Weights that ZeRO 3 has sharded, gathered on every process; otherwise they are there."""
    sharded = list({w.ds_id: w for w in weights if hasattr(w, "ds_id")}.values())
    if not sharded:
        return nullcontext()
    import deepspeed

    context: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(sharded)
    return context
