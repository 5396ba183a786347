"""Scalar models: a value at every token (method section 3)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from denserl_cli.core.errors import DenserlError
from denserl_cli.core.models.causal_lm import hidden_states, load_weights
from denserl_cli.core.models.device import compute_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from denserl_cli.core.data.batches import SequenceBatch
    from denserl_cli.core.recipe.schema import ModelConfig


def load_scalar_model(
    model: ModelConfig,
    *,
    path: str | None = None,
    revision: str | None = None,
    fresh_head: bool,
    trained: bool,
    option: str = "model.path",
) -> PreTrainedModel:
    """A model with a scalar head (`score`, no bias), as reward model or critic (method §3).

    Args:
        model: Of the recipe.
        path: Hub name or folder; None: the recipe's model.
        revision: Of a path that is not the recipe's model.
        fresh_head: Draw the head, see `draw_head`; otherwise the folder must have one.
        trained: Ready to train; otherwise frozen, the body in the compute type.
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
        dtype=torch.float32,
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
    if not trained:
        for weight in loaded.base_model.parameters():  # buffers, such as RoPE's, stay float32
            weight.data = weight.data.to(compute_dtype(model))
    if fresh_head:
        draw_head(loaded)
    return loaded


def draw_head(model: Any) -> None:
    """Draw the scalar head from torch's current seed: normal, std 1/(hidden+1) (method §3)."""
    nn.init.normal_(model.score.weight, std=1 / (model.score.in_features + 1))


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
    states = hidden_states(model, batch)[positions]
    with torch.autocast(states.device.type, enabled=False):  # the head stays float32
        # its weight has another type only under DeepSpeed's bfloat16, which has float32 masters
        values = model.score(states.to(next(model.score.parameters()).dtype))[:, 0].float()
    return batch.window(values)
