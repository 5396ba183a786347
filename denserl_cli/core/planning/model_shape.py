"""The shape of a model without its weights: from a recipe's record, or from a configuration."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from denserl_cli.core.errors import DenserlError

if TYPE_CHECKING:
    from denserl_cli.core.recipe.schema import LoraConfig, Recipe, RecordedConfig


@dataclass(frozen=True)
class ModelShape:
    """A decoder-only language model.

    Attributes:
        hidden: Width of the model.
        intermediate: Width of its feed-forward layers.
        layers: Depth.
        heads: Attention heads.
        queries: Width of all query heads together.
        keys: Width of all key heads together.
        vocabulary: Rows of the embedding.
        parameters: All weights; the head's are counted once where it is the embedding.
        tied: Whether the head is the embedding.
        linears: (name, one side, other side) of the linear maps of one layer.
    """

    hidden: int
    intermediate: int
    layers: int
    heads: int
    queries: int
    keys: int
    vocabulary: int
    parameters: int
    tied: bool
    linears: tuple[tuple[str, int, int], ...]

    @property
    def embedding(self) -> int:
        """Weights of the embedding, V·H; the head has as many."""
        return self.vocabulary * self.hidden

    @property
    def body(self) -> int:
        """Weights without a head of their own: what a reward model or critic takes over."""
        return self.parameters - (0 if self.tied else self.embedding)

    def adapters(self, lora: LoraConfig) -> int:
        """Weights of the adapters: rank · (inputs + outputs) of every adapted linear layer.

        Raises DenserlError for a target that no linear layer ends with.
        """
        names = [name for name, *_ in self.linears]
        for target in lora.targets:
            if not any(f".{name}".endswith(f".{target}") for name in names):
                raise DenserlError(
                    f"lora.targets: no linear layer {target} is known, only {', '.join(names)}",
                    hint="name the model's folder with --model for its own layers",
                )
        wanted = [
            one + other
            for name, one, other in self.linears
            if not lora.targets or any(f".{name}".endswith(f".{t}") for t in lora.targets)
        ]
        return self.layers * lora.rank * sum(wanted)


def recipe_shape(recipe: Recipe, *, recorded: bool = True) -> ModelShape:
    """The shape of a recipe's model: a folder's own, else what the recipe records of it.

    Nothing is downloaded.

    Args:
        recipe: The recipe.
        recorded: Whether its record is of this model.

    Raises:
        DenserlError: The shape cannot be known.
    """
    path = recipe.model.path
    if recipe.sandbox is not None and not path:
        return _sandbox_shape(recipe)
    if recorded and recipe.recorded and not os.path.isdir(path):
        found = recorded_shape(recipe.recorded)
        if found is not None:
            return found
    return configured_shape(path, recipe.model.revision)


def recorded_shape(recorded: RecordedConfig) -> ModelShape | None:
    """The shape that a recipe records; None where a figure is missing.

    A layer of Llama's kind has 2·H·(Q + K) + 3·H·I + 2·H weights, with the embedding, a head of the
    same size unless it is tied to it, and the last norm's H. What is not recorded, the width of an
    attention head and whether the head is tied, follows from the number of weights: a head's width
    is a multiple of 8.
    """
    hidden, inner, layers = recorded.hidden_size, recorded.intermediate_size, recorded.layers
    heads, parameters, vocabulary = recorded.heads, recorded.parameters, recorded.vocabulary
    if not (hidden and inner and layers and heads and parameters and vocabulary):
        return None
    pairs = recorded.key_value_heads or heads

    def width(tied: bool) -> float:
        rest = parameters - vocabulary * hidden * (1 if tied else 2) - hidden
        return (rest / layers - 3 * hidden * inner - 2 * hidden) / (2 * hidden * (heads + pairs))

    def misfit(tied: bool) -> float:
        found = width(tied)
        return abs(found - max(8, 8 * round(found / 8)))

    tied = min((False, True), key=misfit)
    size = max(8, 8 * round(width(tied) / 8))
    queries, keys = heads * size, pairs * size
    return ModelShape(
        hidden=hidden,
        intermediate=inner,
        layers=layers,
        heads=heads,
        queries=queries,
        keys=keys,
        vocabulary=vocabulary,
        parameters=parameters,
        tied=tied,
        linears=(
            ("self_attn.q_proj", hidden, queries),
            ("self_attn.k_proj", hidden, keys),
            ("self_attn.v_proj", hidden, keys),
            ("self_attn.o_proj", queries, hidden),
            ("mlp.gate_proj", hidden, inner),
            ("mlp.up_proj", hidden, inner),
            ("mlp.down_proj", inner, hidden),
        ),
    )


def configured_shape(path: str, revision: str | None = None) -> ModelShape:
    """The shape of a folder's or of an already downloaded hub model, from its config.json.

    Raises DenserlError when there is none, or when it is not a causal language model's.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    from denserl_cli.core.models.architecture import refuse_absurd_sizes

    try:
        config = AutoConfig.from_pretrained(path, revision=revision, local_files_only=True)
    except (OSError, ValueError, KeyError, ArithmeticError, StrictDataclassError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise DenserlError(
            f"the shape of {path or 'the model'} is not known: {first_line}",
            hint="name a folder that has the model's config.json: --model FOLDER",
        ) from error
    refuse_absurd_sizes(config.get_text_config(), path)
    return config_shape(config, path)


def config_shape(config: Any, path: str = "") -> ModelShape:
    """The shape of a configuration of transformers, counted on a model without weights."""
    import torch
    from torch import nn
    from transformers import AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    config = config.get_text_config()
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (ValueError, ImportError) as error:
        raise DenserlError(
            f"{path}: a {config.model_type} model is not a causal language model",
            hint="name a causal language model: --model FOLDER",
        ) from error
    layers = next(
        part for part in model.base_model.modules() if isinstance(part, nn.ModuleList) and len(part)
    )
    linears = tuple(
        (name, part.weight.shape[0], part.weight.shape[1])
        for name, part in layers[0].named_modules()
        if isinstance(part, nn.Linear | Conv1D)
    )
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    return ModelShape(
        hidden=config.hidden_size,
        intermediate=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        layers=len(layers),
        heads=heads,
        queries=heads * size,
        keys=(getattr(config, "num_key_value_heads", None) or heads) * size,
        vocabulary=embedding.weight.shape[0],
        parameters=sum(weight.numel() for weight in {*model.parameters()}),
        tied=bool(config.tie_word_embeddings) or head.weight is embedding.weight,
        linears=linears,
    )


def _sandbox_shape(recipe: Recipe) -> ModelShape:
    import torch

    from denserl_cli.core.sandbox.language_model import build_model, build_tokenizer
    from denserl_cli.core.sandbox.task import Task

    assert recipe.sandbox is not None
    vocabulary = len(build_tokenizer(Task(recipe.sandbox, recipe.seed)))
    with torch.device("meta"):
        return config_shape(build_model(recipe.sandbox, vocabulary).config)
