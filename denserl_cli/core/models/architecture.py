"""What a checkpoint's configuration says of its model, before any weights are read.

Whether denserl can train, sample and score with it is asked of transformers' own classes, not of a
list of names. Nothing here needs the weights, so every stage asks first.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from denserl_cli.core.errors import DenserlError
from denserl_cli.core.models.reward_metadata import RECORD, RewardRecord
from denserl_cli.core.system.hub import readable_errors, weight_names

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from denserl_cli.core.observer import Observer
    from denserl_cli.core.recipe.schema import ModelConfig, Recipe

_NOISE = re.compile(r"dropout|pdrop|jitter|layer_?drop|drop_path")
_SCORED = re.compile(r"For(Sequence|Token)Classification$|Reward|ValueHead|WithValue")
_HEADS = re.compile(r"(^|\.)(score|v_head|value_head|reward_head)\.")
_SIZES = {
    "num_hidden_layers": 10_000,
    "hidden_size": 10**6,
    "intermediate_size": 10**8,
    "num_attention_heads": 10**5,
    "num_key_value_heads": 10**5,
    "vocab_size": 10**8,
}
"""Sizes in a configuration, and the most of each that is believed."""
_TEXT_PART = {
    r"^(model\.)?language_model\.(model\.)?(?!lm_head)": "model.",
    r"^(model\.)?language_model\.lm_head": "lm_head",
}


def read_config(
    path: str, revision: str | None = None, *, what: str = "model", option: str = "model.path"
) -> PreTrainedConfig:
    """A checkpoint's configuration: of its text part, and with all noise of training at 0.

    With dropout, jitter in a router or dropped layers a policy's ratio to itself would not be 1.

    Args:
        path: Hub name or folder.
        revision: Of a hub name.
        what: The model's part, for errors.
        option: The recipe's field that names another folder, for errors.

    Raises:
        DenserlError: It cannot be read, or its weights are packed into fewer bits.
    """
    from transformers import AutoConfig

    with readable_errors(path, what, option):
        # code beside the weights is never run: only architectures of transformers are supported
        config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False)
    packed = getattr(config, "quantization_config", None)
    if packed:
        get = packed.get if isinstance(packed, dict) else lambda name: getattr(packed, name, None)
        raise DenserlError(
            f"the weights of {path} are packed by {get('quant_method') or 'quantization'}, and "
            "packed weights cannot be trained",
            hint="name the model that they were packed from"
            + (f": --set {option}=FOLDER; lora.quantize packs it to 4 bits" if option else ""),
        )
    config = text_config(config)
    refuse_absurd_sizes(config, path)
    switch_off_noise(config)
    return config


def refuse_absurd_sizes(config: PreTrainedConfig, path: str) -> None:
    """Raise DenserlError, naming `path`, for sizes that no model has."""
    for name in _SIZES:
        size = getattr(config, name, 1)
        if isinstance(size, int) and not 0 < size <= _SIZES[name]:
            raise DenserlError(
                f"{path}: config.json has {name} {size}, which no model has",
                hint="copy or download the file again; it belongs to the weights beside it",
            )


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The part of a configuration that describes a causal language model; else the whole."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    part = getattr(config, "text_config", None)
    if part is None or type(part) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return config
    # some say only of the whole that its head is its embedding
    part.tie_word_embeddings = bool(config.tie_word_embeddings or part.tie_word_embeddings)
    return part


def text_part_names(
    path: str, revision: str | None = None, *, what: str = "model", option: str = "model.path"
) -> dict[str, str] | None:
    """How weights of a text part are renamed where a folder holds more than it; else None.

    Arguments as in `read_config`.

    Returns:
        Patterns and replacements, in their order: `key_mapping` of transformers.
    """
    with readable_errors(path, what, option):
        names = weight_names(path, revision) or ()
    return _TEXT_PART if any("language_model." in name for name in names) else None


def forget_text_part(model: Any) -> None:
    """Let a text part be saved under its own names, not under those it was loaded from."""
    vars(model).pop("_weight_conversions", None)


def switch_off_noise(config: PreTrainedConfig) -> None:
    """Set every probability or width of noise in training to 0, in nested configurations as well.

    A boolean, such as `use_dropout`, stays: what it switches on has a number of its own.
    """
    from transformers import PreTrainedConfig

    for name, value in list(vars(config).items()):
        if isinstance(value, PreTrainedConfig):
            switch_off_noise(value)
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and value:
            if _NOISE.search(name):
                setattr(config, name, type(value)(0))


def causal_class(config: PreTrainedConfig, path: str) -> Any:
    """Transformers' class of a causal language model; DenserlError where it is something else."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or config.is_encoder_decoder:
        raise DenserlError(
            f"{path}: a {config.model_type} model is not a causal language model",
            hint="name a causal language model, a decoder alone: --set model.path=FOLDER",
        )
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


def refuse_reward_model(path: str, revision: str | None = None, what: str = "model") -> None:
    """Raise DenserlError where a language model is wanted and a reward model's folder is named.

    transformers would leave its head out and, where embeddings are tied, miss nothing.

    Args:
        path: Hub name or folder.
        revision: Of a hub name.
        what: The model's part, for errors.
    """
    from transformers import AutoConfig

    with readable_errors(path, what):
        config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False)
        names = weight_names(path, revision) or set()
    heads = sorted(name for name in names if _HEADS.search(name))
    # some policies were saved with their reward model's configuration
    language = not heads and any(name.endswith("lm_head.weight") for name in names)
    named = () if language else config.architectures or ()
    kinds = [kind for kind in named if _SCORED.search(kind)]
    if kinds or heads:
        start = "the language model that it was trained from"
        if (Path(path) / RECORD).is_file():
            start = f"{RewardRecord.load(Path(path)).reference}, which it was trained from"
        raise DenserlError(
            f"{path} is a reward model ({', '.join(kinds or heads)}), not a {what}: its head "
            "would be lost",
            hint=f"name {start}",
        )


def check_starting_model(recipe: Recipe, observer: Observer | None = None) -> None:
    """Check what a recipe's starting model is, before data are read and weights loaded.

    Args:
        recipe: Resolved: it names a model.
        observer: Told when lengths are beyond those that the model was made for.

    Raises:
        DenserlError: It is no causal language model, or a reward model; it cannot be sampled from
            token by token; or it would read sequences of the recipe's lengths wrongly.
    """
    model = recipe.model
    config = read_config(model.path, model.revision, what="starting model")
    kind = causal_class(config, model.path)
    refuse_reward_model(model.path, model.revision, "starting model")
    refuse_other_cache(kind, config, model.path)
    longest = {
        "data.max_length": recipe.data.max_length,
        "ppo.max_prompt_length + ppo.rollout.max_new_tokens": (
            recipe.ppo.max_prompt_length + recipe.ppo.rollout.max_new_tokens
        ),
    }
    for field, tokens in longest.items():
        refuse_beyond_limit(config, tokens, field)
    limit = getattr(config, "max_position_embeddings", None)
    beyond = [f"{field} {n}" for field, n in longest.items() if limit and n > limit]
    if beyond and observer is not None:
        observer.notice(
            f"{model.path} was made for sequences of up to {limit} tokens; the recipe allows "
            f"longer ones: {', '.join(beyond)}"
        )


def check_local_model(recipe: Recipe) -> None:
    """Check a starting model whose folder is on this machine, as the stages do; else do nothing.

    Raises DenserlError as `check_starting_model` and `check_scalar_class` do.
    """
    if recipe.model.path and (Path(recipe.model.path).expanduser() / "config.json").is_file():
        check_starting_model(recipe)
        check_scalar_class(recipe.model)


def check_scalar_class(model: ModelConfig) -> None:
    """Raise DenserlError where transformers has no reward model of the starting model's kind."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

    config = read_config(model.path, model.revision, what="starting model")
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise DenserlError(
            f"{model.path}: transformers has no sequence classifier of the kind "
            f"{config.model_type}, which reward models and critics are",
            hint="name a model of another kind, such as Llama, Qwen, Mistral, Gemma 3 or Phi: "
            "--set model.path=FOLDER",
        )


def refuse_other_cache(kind: Any, config: PreTrainedConfig, path: str) -> None:
    """Raise DenserlError for a model that keeps what it has read in a cache of its own kind.

    Args:
        kind: Its class.
        config: Its configuration.
        path: Its hub name or folder.
    """
    from transformers import DynamicCache

    usable = "past_key_values" in inspect.signature(kind.forward).parameters
    if usable and kind._supports_default_dynamic_cache():
        try:
            DynamicCache(config=config)
            return
        except (KeyError, ValueError, AttributeError, TypeError):
            pass  # it has layers that a DynamicCache does not know
    raise DenserlError(
        f"{path}: a {config.model_type} model keeps what it has read in a cache of its own, and "
        "responses cannot be sampled from it here",
        hint="name a model of another kind: --set model.path=FOLDER",
    )


def positions_limit(config: PreTrainedConfig) -> tuple[int, str] | None:
    """The longest sequence that a model reads as it should, and why; None without a limit.

    Beyond the border of a LongRoPE or dynamic RoPE a sequence changes how all of its batch is read,
    and keys that were cached before it are of the other side. A table of positions has an end.
    """
    ropes = getattr(config, "rope_parameters", None)
    most = getattr(config, "max_position_embeddings", None)
    if ropes is None:
        return (most, "it has no positions beyond them") if most and most > 0 else None
    borders = []
    for rope in (ropes, *ropes.values()):
        kind = rope.get("rope_type") or rope.get("type") if isinstance(rope, dict) else None
        if kind == "longrope":
            border = rope.get("original_max_position_embeddings")
            borders.append(border or getattr(config, "original_max_position_embeddings", most))
        elif kind is not None and "dynamic" in kind:
            borders.append(most)
    if not any(borders):
        return None
    why = "beyond them its rotary positions change for all sequences of a batch"
    return min(border for border in borders if border), why


def refuse_beyond_limit(config: Any, tokens: int, field: str = "") -> None:
    """Raise DenserlError where a model would read a sequence of so many tokens wrongly.

    Args:
        config: Of the model.
        tokens: Of the longest sequence.
        field: Of the recipe, that allows so many tokens.
    """
    limit = positions_limit(config)
    if limit is not None and tokens > limit[0]:
        given = f"{field} allows {tokens}" if field else f"one has {tokens}"
        name = config.name_or_path or "the model"
        raise DenserlError(
            f"{name} reads sequences of at most {limit[0]} tokens ({limit[1]}); {given}",
            hint=f"lower {field or 'data.max_length or ppo.rollout.max_new_tokens'}",
        )
