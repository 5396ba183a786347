"""Causal language models as policy, reference and critic body: loading, and one forward pass.

Everything works on hidden states; logits exist only inside the streamed likelihood.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from denserl_cli.core.likelihood import logprob_and_entropy
from denserl_cli.core.models.architecture import refuse_beyond_limit, refuse_reward_model
from denserl_cli.core.models.cache_check import refuse_unfaithful_cache
from denserl_cli.core.models.device import autocast, compute_dtype
from denserl_cli.core.models.load_checks import once, refuse_unusual_head
from denserl_cli.core.models.packed_attention import packed_options
from denserl_cli.core.models.placement import Placement, whole
from denserl_cli.core.models.weights import load_weights

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
    refuse_reward_model(model.path, model.revision, what)
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
        if not trained:  # every stage that samples, and most of the others, load a frozen one
            once(refuse_unfaithful_cache, loaded, model.path)
    StreamedHead.take_over(loaded)
    return loaded


def hidden_states(model: Any, batch: SequenceBatch) -> Tensor:
    """Last hidden states of a batch, one row after the other: (R * S, H)."""
    body = model.base_model if hasattr(model, "base_model") else model
    packing = batch.packing
    refuse_beyond_limit(
        model.config, batch.input_ids.shape[1] if packing is None else max(packing.whole)
    )
    options = {} if packing is None else packed_options(packing)
    states = body(input_ids=batch.input_ids, use_cache=False, **options).last_hidden_state
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
    states = hidden_states(model, batch)[batch.preceding_positions]
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
