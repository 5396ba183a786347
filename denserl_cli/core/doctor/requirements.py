"""What a recipe needs to run, and what of it is on this machine: models, data, GPUs, libraries."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from denserl_cli.core.errors import DenserlError

if TYPE_CHECKING:
    from denserl_cli.core.recipe.schema import Recipe

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True)
class RecipeNeeds:
    """What a recipe needs.

    Attributes:
        recipe: Its name.
        here: Models and data that are on this machine.
        missing: Everything that is not, each with what is known of it.
    """

    recipe: str
    here: list[str]
    missing: list[str]

    def redacted(self, redact: Callable[[str], str]) -> RecipeNeeds:
        """The same with every text put through a function."""
        here, missing = map(redact, self.here), map(redact, self.missing)
        return RecipeNeeds(redact(self.recipe), list(here), list(missing))


def recipe_needs(name: str) -> RecipeNeeds:
    """What a recipe needs.

    Args:
        name: A shipped recipe, or a file.

    Raises:
        DenserlError: There is no such recipe, or it is wrong.
    """
    from denserl_cli.core.recipe import load_recipe

    recipe, here, missing = load_recipe(name), list[str](), list[str]()
    for what, state in _downloads(recipe):
        if state == "here":
            here.append(what)
        else:
            missing.append(f"{what}: {state}")
    return RecipeNeeds(recipe.name, here, [*missing, *_hardware(recipe), *_libraries(recipe)])


def _downloads(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Each model and data source with its state; a sandbox makes its own."""
    model, published, data = recipe.model, recipe.published, recipe.data
    licence = ", licence to accept" if recipe.recorded and recipe.recorded.gated else ""
    if model.path:
        state = _model_state(model.path, model.revision)
        yield f"model {model.path}", state if state == "here" else state + licence
    if model.tokenizer and model.tokenizer != model.path:
        yield f"tokenizer {model.tokenizer}", _tokenizer_state(model.tokenizer)
    if published is not None:
        state = _model_state(published.reward_model, published.revision)
        yield f"published reward model {published.reward_model}", state
        if published.policy:
            yield f"published policy {published.policy}", _model_state(published.policy, None)
    sources = (*data.preferences, *data.evaluation, *data.prompts)
    for path in dict.fromkeys(source.path for source in sources):
        yield f"data {path}", _data_state(path)


def _hardware(recipe: Recipe) -> Iterator[str]:
    """GPUs of the published training that are not here."""
    import torch

    wanted, have = recipe.recorded and recipe.recorded.gpus, torch.cuda.device_count()
    if wanted and wanted > have:
        yield f"GPUs: {wanted} in the published training, {have} here"


def _libraries(recipe: Recipe) -> Iterator[str]:
    """Optional libraries that the recipe asks for and that are not here, or not usable."""
    from transformers.utils import is_flash_attn_2_available

    from denserl_cli.core.runs.trackers import check_trackers

    if recipe.model.attention == "flash_attention_2" and not is_flash_attn_2_available():
        yield "model.attention: flash_attention_2 is not usable here"
    try:
        check_trackers(recipe)
    except DenserlError as error:
        yield f"{error.message}: {error.hint}"
    if recipe.lora is not None and recipe.lora.quantize:
        try:
            metadata.version("bitsandbytes")
        except metadata.PackageNotFoundError:
            yield "bitsandbytes: pip install 'denserl[qlora]'"


def _model_state(path: str, revision: str | None) -> str:
    """`here` for a folder or a whole download; a recipe names no folder that is not there."""
    if Path(path).is_dir():
        return "here"
    if _cached(path, "config.json", revision) is None:
        return "not downloaded"
    for name in _WEIGHTS:
        index = _cached(path, f"{name}.index.json", revision)
        if index is not None:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            whole = all(_cached(path, shard, revision) for shard in shards)
            return "here" if whole else "downloaded in part"
        if _cached(path, name, revision) is not None:
            return "here"
    return "downloaded in part"


def _tokenizer_state(path: str) -> str:
    files = ("tokenizer_config.json", "tokenizer.json")
    here = Path(path).is_dir() or any(_cached(path, name, None) for name in files)
    return "here" if here else "not downloaded"


def _data_state(path: str) -> str:
    from huggingface_hub import constants

    if Path(path).exists():
        return "here"
    downloaded = Path(constants.HF_HUB_CACHE) / f"datasets--{path.replace('/', '--')}" / "snapshots"
    return "here" if downloaded.is_dir() or _prepared(path).is_dir() else "not downloaded"


def _prepared(path: str) -> Path:
    """Where `datasets` keeps a data set that it has read."""
    from huggingface_hub import constants

    cache = os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME) / "datasets"
    return Path(cache) / path.replace("/", "___")


def _cached(path: str, name: str, revision: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(path, name, revision=revision)
    return Path(found) if isinstance(found, str) else None
