"""Loading the weights of a model: from its folder or the hub, checked, ready to train or frozen."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

from denserl_cli.core.errors import DenserlError
from denserl_cli.core.models.architecture import (
    causal_class,
    forget_text_part,
    read_config,
    text_part_names,
)
from denserl_cli.core.models.attention import attention_kernel, set_aside_cudnn
from denserl_cli.core.models.device import autocast, compute_dtype, device
from denserl_cli.core.models.load_checks import (
    once,
    refuse_damaged_weights,
    refuse_two_way_attention,
)
from denserl_cli.core.models.placement import Placement, on_device, whole
from denserl_cli.core.system.hub import readable_errors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from denserl_cli.core.recipe.schema import ModelConfig


def load_weights(
    kind: Any,
    model: ModelConfig,
    path: str,
    *,
    trained: bool,
    what: str,
    placement: Placement | None = None,
    revision: str | None = None,
    fresh: str | None = None,
    num_labels: int | None = None,
    quantization: Any = None,
    option: str = "model.path",
    causal: bool = True,
) -> PreTrainedModel:
    """Load a model, ready to train or frozen.

    Args:
        kind: One of transformers' auto classes.
        model: Of the recipe.
        path: Hub name or folder.
        trained: Ready to train; otherwise frozen.
        what: The model's part, for errors.
        placement: Where the weights are put; None: all on this process's device, in float32 to
            train, otherwise in the compute type.
        revision: Of a path that is not the recipe's model.
        fresh: Name of a layer that the folder need not have.
        num_labels: Of a classification head; None for other kinds.
        quantization: transformers' configuration of it, for frozen weights.
        option: The recipe's field that names another folder, for errors.
        causal: False takes any model that is not an encoder and a decoder.

    Raises:
        DenserlError: The model is absent, not causal, lacks weights, which transformers would fill
            with random numbers, or has others that transformers would leave out.
    """
    revision = model.revision if path == model.path else revision
    placement = placement or whole(model, trained=trained)
    config = read_config(path, revision, what=what, option=option)
    if causal:
        causal_class(config, path)
    elif config.is_encoder_decoder:
        raise DenserlError(
            f"{path}: a {config.model_type} model is an encoder and a decoder",
            hint=f"name another model: --set {option}=FOLDER",
        )
    if num_labels is not None:
        config.num_labels = num_labels
    set_aside_cudnn(model)
    kernel = (
        attention_kernel(model, kind._model_mapping.get(type(config), None)) if causal else None
    )
    renamed = text_part_names(path, revision, what=what, option=option)
    with readable_errors(path, what, option), placement.loading(), float32_head(config):
        loaded, report = kind.from_pretrained(
            path,
            config=config,
            revision=revision,
            dtype=placement.dtype,
            attn_implementation=kernel,
            key_mapping=renamed,
            quantization_config=quantization,
            device_map=None if placement.sharded else on_device(device()),
            trust_remote_code=False,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    if renamed:
        forget_text_part(loaded)
    prepare(loaded, model, trained=trained)
    if causal:
        # FlashAttention needs half precision
        with autocast(loaded.device, compute_dtype(model)), placement.running(loaded):
            once(refuse_two_way_attention, loaded, path)
    _refuse_other_weights(loaded, report, path, what, fresh)
    refuse_damaged_weights(loaded, path, what, placement, fresh)
    return loaded


def _refuse_other_weights(
    loaded: PreTrainedModel, report: dict[str, Any], path: str, what: str, fresh: str | None
) -> None:
    """Raise DenserlError where the files lack weights of a model, or have others of its kinds."""
    lacking = [*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])]
    lacking = sorted(key for key in lacking if fresh is None or not key.startswith(fresh))
    if lacking:
        raise DenserlError(
            f"{path} lacks weights of the {what}, or has them in other shapes: "
            f"{', '.join(lacking[:5])}",
            hint="name a folder that has a whole model of this kind",
        )
    left_out = _left_out(loaded, report["unexpected_keys"])
    if left_out:
        raise DenserlError(
            f"{path} has weights that are not part of the {loaded.config.model_type} model that "
            f"its config.json describes: {', '.join(left_out[:5])}",
            hint="without them it would be another model; name one that transformers supports",
        )


@contextmanager
def float32_head(config: Any) -> Iterator[None]:
    """Make transformers keep the `score` of a classifier in float32, whatever the body's type."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

    kind: Any = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(type(config), None)
    if kind is None:
        yield
        return
    kept = kind._keep_in_fp32_modules_strict
    kind._keep_in_fp32_modules_strict = {*(kept or ()), r"^score\."}
    try:
        yield
    finally:
        kind._keep_in_fp32_modules_strict = kept


def _left_out(model: Any, unexpected: Iterable[str]) -> list[str]:
    """Weights of the kinds that a model has, but it has no place for them.

    They are biases of its linear layers, and whole layers beyond its last.
    """
    linear = {name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    kinds = {re.sub(r"\d+", "*", name) for name, _ in model.named_parameters()}
    kinds |= {f"{re.sub(r'[0-9]+', '*', name)}.bias" for name in linear}
    return sorted(name for name in unexpected if re.sub(r"\d+", "*", name) in kinds)


def prepare(loaded: Any, model: ModelConfig, *, trained: bool) -> None:
    """Move to the device; freeze, or switch gradient checkpointing on."""
    loaded.to(device())
    loaded.requires_grad_(trained)
    loaded.train(trained)
    if trained:
        checkpoint_activations(loaded, model)


def checkpoint_activations(loaded: Any, model: ModelConfig) -> None:
    """Switch gradient checkpointing on where the recipe asks for it."""
    if model.gradient_checkpointing:
        enable = getattr(  # the first name is that of newer releases of transformers
            loaded, "activation_checkpointing_enable", loaded.gradient_checkpointing_enable
        )
        enable({"use_reentrant": False})
