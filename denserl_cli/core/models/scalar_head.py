"""Scalar models: a value at every token (method section 3)."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from denserl_cli.core.errors import DenserlError
from denserl_cli.core.models.attention_row import attention_calls, response_attention
from denserl_cli.core.models.causal_lm import hidden_states
from denserl_cli.core.models.weights import load_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from denserl_cli.core.data.batches import SequenceBatch
    from denserl_cli.core.models.placement import Placement
    from denserl_cli.core.recipe.schema import ModelConfig


def load_scalar_model(
    model: ModelConfig,
    *,
    path: str | None = None,
    revision: str | None = None,
    fresh_head: bool,
    trained: bool,
    placement: Placement | None = None,
    option: str = "model.path",
) -> PreTrainedModel:
    """A model with a scalar head (`score`, no bias), as reward model or critic (method §3).

    Args:
        model: Of the recipe.
        path: Hub name or folder; None: the recipe's model.
        revision: Of a path that is not the recipe's model.
        fresh_head: Draw the head, see `draw_head`; otherwise the folder must have one.
        trained: Ready to train; otherwise frozen.
        placement: Where the weights are put; None: all on this process's device, in float32 to
            train, otherwise in the compute type.
        option: The recipe's field that names the path, for errors.

    Raises:
        DenserlError: The model cannot be loaded, lacks a head, or has one of another kind.
    """
    from transformers import AutoModelForSequenceClassification

    loaded = load_weights(
        AutoModelForSequenceClassification,
        model,
        path or model.path,
        revision=revision,
        trained=trained,
        what="starting model" if fresh_head else "reward model",
        fresh="score" if fresh_head else None,
        placement=placement,
        num_labels=1,
        option=option,
    )
    head = getattr(loaded, "score", None)
    if not isinstance(head, nn.Linear) or head.bias is not None:
        raise DenserlError(
            f"{path or model.path}: the head of a {loaded.config.model_type} classifier is not a "
            "plain matrix product",
            hint="it can only reward whole responses: set segmentation.granularity=bandit",
        )
    if fresh_head:
        draw_head(loaded)
    ScalarHead.take_over(loaded)
    return loaded


class ScalarHead(nn.Linear):
    """A scalar head that computes in float32, whatever the type of the body.

    Attributes:
        exact: The weight in float32 where `weight` is a rounded copy of it, as under DeepSpeed;
            gradients go to `weight`.
    """

    exact: Tensor | None = None

    @classmethod
    def take_over(cls, model: Any) -> None:
        """Turn a model's `score` into one of these; its weight and name stay the same."""
        model.score.__class__ = cls

    def forward(self, input: Tensor) -> Tensor:
        """One number for each state: (..., H) to (..., 1), float32."""
        weight = self.weight.float()
        if self.exact is not None:
            weight = weight + (self.exact - weight).detach()  # both steps are without rounding
        with torch.autocast(input.device.type, enabled=False):
            return nn.functional.linear(input.float(), weight)


def draw_head(model: Any) -> None:
    """Draw the scalar head from torch's current seed: normal, std 1/(hidden+1) (method §3)."""
    head = model.score.weight
    drawn = torch.empty(head.shape, device=head.device)
    head.data = drawn.normal_(std=1 / (model.score.in_features + 1))


class Reading(NamedTuple):
    """What one pass of a reward model gave.

    Attributes:
        token_values: (R, T), float32, 0 where masked.
        more: By the name that sources of rewards know it by: prompt_value (R,), attention (R, T).
    """

    token_values: Tensor
    more: dict[str, Tensor]


def token_values(model: Any, batch: SequenceBatch, *, before: bool = False) -> Tensor:
    """The scalar head's value at every response token.

    Args:
        model: With a scalar head.
        batch: Of R sequences.
        before: Read the value at the position before each token, the state in which the token is
            chosen (for a critic).

    Returns:
        (R, T), float32, 0 where masked.
    """
    positions = batch.preceding_positions if before else batch.response_positions
    return batch.window(_values(model, hidden_states(model, batch), positions))


def read_more(model: Any, batch: SequenceBatch, *, wanted: Collection[str]) -> Reading:
    """The scalar head's value at every response token and, of the same pass, what else is wanted.

    Args:
        model: With a scalar head.
        batch: Of R padded sequences.
        wanted: Names of `Reading.more`.
    """
    more = {}
    if "attention" in wanted:
        with attention_calls(model) as call:
            states = hidden_states(model, batch)
        more["attention"] = response_attention(call, batch)
    else:
        states = hidden_states(model, batch)
    if "prompt_value" in wanted:
        more["prompt_value"] = batch.window(_values(model, states, batch.preceding_positions))[:, 0]
    return Reading(batch.window(_values(model, states, batch.response_positions)), more)


def _values(model: Any, states: Tensor, positions: Tensor) -> Tensor:
    """The head's value at N positions: (N,), float32."""
    values: Tensor = model.score(states[positions])[:, 0]
    return values
