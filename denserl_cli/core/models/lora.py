"""LoRA through peft: all models of a stage share one set of frozen weights.

The starting model is loaded once and frozen. A trained model is a second set of modules over the
same weight tensors, with its own adapters and, for a reward model or critic, its own scalar head.
So the reference is the policy without adapters, and adapters are never switched on or off.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from denserl_cli.core.errors import DenserlError
from denserl_cli.core.models.causal_lm import load_causal_lm
from denserl_cli.core.models.device import compute_dtype, device
from denserl_cli.core.models.scalar_head import ScalarHead, draw_head, load_scalar_model
from denserl_cli.core.models.weights import checkpoint_activations, prepare
from denserl_cli.core.system.hub import readable_errors

if TYPE_CHECKING:
    from peft import LoraModel
    from transformers import PreTrainedModel

    from denserl_cli.core.models.placement import Placement
    from denserl_cli.core.recipe.schema import LoraConfig, Recipe

FILES = ("adapter_config.json", "adapter_model.safetensors")
"""The files of a folder of adapters, as peft names them."""
HEAD, ADAPTER = "score", "default"


def quantization(recipe: Recipe) -> Any:
    """The quantization of frozen weights to 4 bits, for transformers; None without `lora.quantize`.

    Raises DenserlError where bitsandbytes cannot do it. Its CPU backend is not enough: it repacks
    weights in place at inference, and no gradient passes through them afterwards.
    """
    if recipe.lora is None or not recipe.lora.quantize:
        return None
    from transformers import BitsAndBytesConfig

    def refusal(why: object) -> DenserlError:
        return DenserlError(
            f"lora.quantize needs bitsandbytes on a CUDA GPU: {why}",
            hint="pip install 'denserl[qlora]' on a machine that has one, "
            "or --set lora.quantize=false",
        )

    if device().type != "cuda":
        raise refusal(f"this process runs on the {device().type}")
    try:
        from bitsandbytes.functional import quantize_4bit

        quantize_4bit(torch.zeros(64, device=device()))
    except (ImportError, OSError, RuntimeError) as error:
        raise refusal(error) from error
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype(recipe.model),
    )


def load_reference(recipe: Recipe, placement: Placement | None = None) -> PreTrainedModel:
    """The frozen starting model of a recipe, in 4 bits with `lora.quantize`."""
    return load_causal_lm(
        recipe.model, trained=False, placement=placement, quantization=quantization(recipe)
    )


def new_policy(
    recipe: Recipe, reference: PreTrainedModel, placement: Placement | None = None
) -> PreTrainedModel:
    """The policy before training: all weights are trained, or adapters over the reference's."""
    if recipe.lora is None:
        return load_causal_lm(recipe.model, trained=True, placement=placement)
    return _add_adapters(twin(reference), recipe)


def new_scalar_model(
    recipe: Recipe, reference: PreTrainedModel | None, placement: Placement | None = None
) -> PreTrainedModel:
    """A reward model or critic before training, as in `new_policy`, with a fresh head."""
    if recipe.lora is None:
        return load_scalar_model(recipe.model, fresh_head=True, trained=True, placement=placement)
    return _add_adapters(scalar_model_over(reference or load_reference(recipe)), recipe)


def load_policy(
    recipe: Recipe,
    path: str | Path,
    *,
    reference: PreTrainedModel | None = None,
    revision: str | None = None,
    placement: Placement | None = None,
) -> PreTrainedModel:
    """A frozen policy to sample from: a whole model, or adapters over the recipe's model.

    Args:
        recipe: Of the run.
        path: Folder or hub name.
        reference: The recipe's starting model where it is loaded already; adapters share its
            weights.
        revision: Of a hub name that is not the recipe's model.
        placement: Where the weights of a whole model are put.
    """
    if str(path) == recipe.model.path and revision in (None, recipe.model.revision):
        return load_reference(recipe, placement)
    if not is_adapters(path):
        policy = replace(recipe.model, path=str(path), revision=revision)
        return load_causal_lm(policy, trained=False, placement=placement, what="policy")
    start = load_reference(recipe) if reference is None else twin(reference)
    return _load_adapters(start, path).requires_grad_(False).eval()


def saved_scalar_model(
    recipe: Recipe,
    path: str,
    *,
    revision: str | None = None,
    trained: bool = False,
    placement: Placement | None = None,
    reference: PreTrainedModel | None = None,
    option: str = "model.path",
) -> PreTrainedModel:
    """A reward model from a folder, frozen or to be trained further as a critic.

    Args:
        recipe: Says what of a critic is trained: all weights, or adapters.
        path: Folder or hub name, of a whole model or of adapters.
        revision: Of a hub name.
        trained: Load it to be trained.
        placement: Where the weights of a whole model are put.
        reference: The recipe's starting model where it is loaded already; adapters share its
            weights.
        option: The recipe's field that names the path, for errors.
    """
    lora = recipe.lora is not None
    if not is_adapters(path):
        whole = load_scalar_model(
            recipe.model,
            path=path,
            revision=revision,
            fresh_head=False,
            trained=trained and not lora,
            placement=placement,
            option=option,
        )
        return _add_adapters(whole, recipe) if trained and lora else whole
    if trained and not lora:
        whole = merged(recipe, path, scalar=True)
        prepare(whole, recipe.model, trained=True)
        return whole
    model = _load_adapters(scalar_model_over(reference or load_reference(recipe)), path)
    return _to_train(model, recipe) if trained else model.requires_grad_(False).eval()


def merged(recipe: Recipe, folder: str | Path, *, scalar: bool) -> PreTrainedModel:
    """The starting model in float32 with a folder's adapters added to its weights.

    Args:
        recipe: Names the starting model.
        folder: Of the adapters.
        scalar: They are those of a reward model or critic.
    """
    start = load_causal_lm(replace(recipe.model, gradient_checkpointing=False), trained=True)
    whole: Any = _loaded(scalar_model_over(start) if scalar else start, folder).merge_and_unload()
    return whole


def is_adapters(folder: str | Path) -> bool:
    """Whether a folder holds adapters, not a whole model."""
    return (Path(folder) / FILES[0]).is_file()


def twin(model: Any) -> Any:
    """A second set of modules over the same weight tensors; new modules are added to one alone."""
    weights = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(weight): weight for weight in weights})


def scalar_model_over(causal_lm: PreTrainedModel) -> PreTrainedModel:
    """A model with a fresh scalar head that shares the weights of a language model's body."""
    from transformers import AutoModelForSequenceClassification

    config = copy.deepcopy(causal_lm.config)
    config.num_labels = 1
    with readable_errors(causal_lm.name_or_path or "", "reward model"), torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config)
    body = twin(causal_lm.base_model)
    if type(body) is not type(model.base_model):
        raise DenserlError(
            f"a scalar head cannot be added to the body of a {config.model_type} model",
            hint="train all weights: --set lora=null",
        )
    setattr(model, model.base_model_prefix, body)
    model.score = model.score.to_empty(device=causal_lm.device).float()
    draw_head(model)
    ScalarHead.take_over(model)
    model.is_loaded_in_4bit = getattr(causal_lm, "is_loaded_in_4bit", False)  # peft reads it
    return model.eval()


def _add_adapters(model: Any, recipe: Recipe) -> Any:
    """Add fresh adapters, which change nothing yet; they and the head, if any, are trained."""
    from peft import LoraConfig

    lora, scalar = recipe.lora, hasattr(model, HEAD)
    assert lora is not None
    model.add_adapter(
        LoraConfig(
            task_type="SEQ_CLS" if scalar else "CAUSAL_LM",
            r=lora.rank,
            lora_alpha=lora.alpha,  # type: ignore[arg-type]  # it need not be an integer
            target_modules=_targets(model, lora),
            modules_to_save=[HEAD] if scalar else None,
        )
    )
    return _to_train(model, recipe)


def _targets(model: Any, lora: LoraConfig) -> list[str]:
    """Full names of the body's linear layers that get adapters."""
    from transformers.pytorch_utils import Conv1D

    layers = [
        name
        for name, module in model.base_model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
    ]
    found = {
        target: [name for name in layers if f".{name}".endswith(f".{target}")]
        for target in lora.targets
    }
    unknown = [target for target, names in found.items() if not names]
    if unknown or not layers:
        known = ", ".join(sorted({name.rpartition(".")[2] for name in layers})) or "none"
        raise DenserlError(
            f"lora.targets: the model's body has no linear layer {', '.join(unknown)}".rstrip(),
            hint=f"its linear layers are: {known}",
        )
    wanted = {name for names in found.values() for name in names} or set(layers)
    return [f"{model.base_model_prefix}.{name}" for name in layers if name in wanted]


def _to_train(model: Any, recipe: Recipe) -> Any:
    """Make a model with adapters ready to train."""
    _learnt(model)
    model.train()
    checkpoint_activations(model, recipe.model)
    return model


def _learnt(model: Any) -> dict[str, nn.Parameter]:
    """The adapters and the head of a model, made float32: peft gives them the body's type."""
    learnt = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for weight in learnt.values():
        weight.data = weight.data.float()
    return learnt


def _load_adapters(model: Any, folder: str | Path) -> Any:
    """A model with a folder's adapters, and its head if it has one, ready to be trained."""
    return _loaded(model, folder).model


def _loaded(model: Any, folder: str | Path) -> LoraModel:
    """A model with a folder's adapters, as peft's `LoraModel`; DenserlError if they do not fit."""
    from peft import LoraModel, PeftConfig
    from peft.utils import load_peft_weights, set_peft_model_state_dict

    with readable_errors(str(folder), "adapters", option=""):
        config = PeftConfig.from_pretrained(str(folder))
        config.inference_mode = False
        weights = load_peft_weights(str(folder), device="cpu")
        held = LoraModel(model, {ADAPTER: config}, ADAPTER)
        names = {
            name.replace(f".{ADAPTER}", "").replace(".modules_to_save", "")
            for name in _learnt(model)
        }
        weights = {name.removeprefix("base_model.model."): w for name, w in weights.items()}
        wrong = sorted(names ^ weights.keys())
        if wrong:
            raise ValueError(f"lacking, or of another model: {', '.join(wrong[:3])}")
        set_peft_model_state_dict(model, weights, ADAPTER)
    return held
