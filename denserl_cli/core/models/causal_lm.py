"""Causal language models as policy, reference and critic body: loading, and one forward pass.

Everything works on hidden states; logits exist only inside the streamed likelihood.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from denserl_cli.core.errors import DenserlError
from denserl_cli.core.likelihood import logprob_and_entropy
from denserl_cli.core.models.device import attention_kernel, autocast, compute_dtype, device
from denserl_cli.core.models.load_checks import (
    once,
    refuse_damaged_weights,
    refuse_two_way_attention,
    refuse_unusual_head,
)
from denserl_cli.core.models.placement import Placement, on_device, whole
from denserl_cli.core.system.hub import readable_errors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from denserl_cli.core.data.batches import SequenceBatch
    from denserl_cli.core.recipe.schema import ModelConfig


class ResponseScores(NamedTuple):
    """Log-probabilities and entropies of R responses, in nats.

    Attributes:
        logprobs: (R, T), of each response token, 0 where masked.
        entropy: (R, T), or None where it was not computed. entropy[:, j] is that of the
            distribution after response token j (method §1), and 0 at each row's last token, where
            it is not needed, and where masked. With `drawn` it is that of the distribution that
            token j was drawn from.
    """

    logprobs: Tensor
    entropy: Tensor | None


def load_causal_lm(
    model: ModelConfig,
    *,
    trained: bool,
    placement: Placement | None = None,
    quantization: Any = None,
    what: str = "starting model",
) -> PreTrainedModel:
    """Load a causal language model.

    Args:
        model: Of the recipe.
        trained: Weights with gradients; otherwise frozen ones.
        placement: Where the weights are put; None: all on this process's device, in float32 to
            train, otherwise in the compute type.
        quantization: transformers' configuration of it, for frozen weights.
        what: The model's part, for errors.

    Raises:
        DenserlError: The model is absent, incomplete or not causal, or its head is more than a
            matrix product, which the streamed likelihood does not support.
    """
    from transformers import AutoModelForCausalLM

    placement = placement or whole(model, trained=trained)
    loaded = load_weights(
        AutoModelForCausalLM,
        model,
        model.path,
        trained=trained,
        placement=placement,
        what=what,
        quantization=quantization,
    )
    with autocast(loaded.device, compute_dtype(model)), placement.running(loaded):
        once(refuse_unusual_head, loaded, model.path)
    StreamedHead.take_over(loaded)
    return loaded


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
            with random numbers, or has a bias that transformers would leave out.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    revision = model.revision if path == model.path else revision
    placement = placement or whole(model, trained=trained)
    with readable_errors(path, what, option):
        # code beside the weights is never run: only architectures of transformers are supported
        config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False)
        known = not causal or type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
        if not known or config.is_encoder_decoder:
            raise ValueError(f"a {config.model_type} model is not a causal language model")
        if num_labels is not None:
            config.num_labels = num_labels
        for name, value in vars(config).items():
            if isinstance(value, float) and ("dropout" in name or name.endswith("pdrop")):
                setattr(config, name, 0.0)  # with dropout a policy's ratio to itself would not be 1
        with placement.loading(), float32_head(config):
            loaded, report = kind.from_pretrained(
                path,
                config=config,
                revision=revision,
                dtype=placement.dtype,
                attn_implementation=attention_kernel(model) if causal else None,
                quantization_config=quantization,
                device_map=None if placement.sharded else on_device(device()),
                trust_remote_code=False,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    prepare(loaded, model, trained=trained)
    if causal:
        # FlashAttention needs half precision
        with autocast(loaded.device, compute_dtype(model)), placement.running(loaded):
            once(refuse_two_way_attention, loaded, path)
    lacking = [*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])]
    lacking = sorted(key for key in lacking if fresh is None or not key.startswith(fresh))
    if lacking:
        raise DenserlError(
            f"{path} lacks weights of the {what}, or has them in other shapes: "
            f"{', '.join(lacking[:5])}",
            hint="name a folder that has a whole model of this kind",
        )
    refuse_damaged_weights(loaded, path, what, placement, fresh)
    biases = [key for key in report["unexpected_keys"] if _is_bias(loaded, key)]
    if biases:
        raise DenserlError(
            f"{path} has weights that are not part of a {config.model_type} model: "
            f"{', '.join(sorted(biases)[:5])}",
            hint="without them it would be another model; name one that transformers supports",
        )
    return loaded


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


def _is_bias(model: Any, key: str) -> bool:
    """Whether a name is that of the bias of a linear layer that the model has."""
    layer, _, name = key.rpartition(".")
    return name == "bias" and isinstance(dict(model.named_modules()).get(layer), torch.nn.Linear)


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


def hidden_states(model: Any, batch: SequenceBatch) -> Tensor:
    """Last hidden states of a batch, one row after the other: (R * S, H)."""
    body = model.base_model if hasattr(model, "base_model") else model
    states = body(input_ids=batch.input_ids, use_cache=False).last_hidden_state
    return states.flatten(0, 1)


class StreamedHead(nn.Linear):
    """A language-model head that, given targets, streams log-probabilities and entropies.

    It is a module because under ZeRO 3 a head's weight is in place only while the head is called.
    """

    @classmethod
    def take_over(cls, model: Any) -> None:
        """Turn a model's head into one of these; its weight and name stay the same."""
        model.get_output_embeddings().__class__ = cls

    def forward(self, input: Tensor, targets: Tensor | None = None, **options: Any) -> Any:
        """Logits of hidden states or, with targets, what `logprob_and_entropy` returns."""
        if targets is None:
            return super().forward(input)
        return logprob_and_entropy(input, self.weight, targets, **options)


def response_logprobs(
    model: Any,
    batch: SequenceBatch,
    *,
    temperature: float = 1.0,
    with_entropy: bool = True,
    drawn: bool = False,
) -> ResponseScores:
    """Log-probabilities of the response tokens, and entropies, in one pass (method §1).

    The token in column j is predicted at the position before it. The entropy of column j-1 belongs
    to the same position: both come from the same row of the head's product.

    Args:
        model: A causal language model.
        batch: Of R sequences.
        temperature: Of the log-probabilities.
        with_entropy: Compute entropies.
        drawn: Entropies are those of the tempered distributions that the tokens were drawn from;
            otherwise those after each token, at temperature 1.

    Returns:
        (R, T) each.
    """
    states = hidden_states(model, batch)[batch.response_positions - 1]
    targets = batch.responses[batch.response_mask]
    head = model.get_output_embeddings()
    both = with_entropy and (drawn or temperature == 1.0)
    if not isinstance(head, StreamedHead):
        StreamedHead.take_over(model)
    logprob, entropy = head(states, targets, temperature=temperature, with_entropy=both)
    if with_entropy and not both:
        _, entropy = head(states, targets)
    logprobs = batch.window(logprob)
    if entropy is None:
        return ResponseScores(logprobs, None)
    before = batch.window(entropy)
    if drawn:
        return ResponseScores(logprobs, before)
    after = torch.cat([before[:, 1:], before.new_zeros(len(before), 1)], dim=1)
    return ResponseScores(logprobs, after)
