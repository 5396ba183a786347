"""The model card of an export: what it is, how to read it, its metrics, the recipe that made it."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jinja2 import Environment, PackageLoader, StrictUndefined

from denserl_cli import __version__
from denserl_cli.core.exports.compatibility import TRIED, VERSIONS
from denserl_cli.core.recipe.document import to_yaml
from denserl_cli.core.recipe.dump import recipe_to_dict

if TYPE_CHECKING:
    from denserl_cli.core.chat.format import ChatFormat
    from denserl_cli.core.models.reward_metadata import RewardRecord
    from denserl_cli.core.recipe.schema import Recipe

Part = Literal["policy", "policy-best", "reward-model"]

MADE_BY = "Made by denserl"
"""What every card says, and by which a folder is known as an export."""


def model_card(
    part: Part,
    recipe: Recipe,
    summary: dict[str, Any],
    chat: ChatFormat,
    record: RewardRecord | None = None,
    *,
    architecture: str = "llama",
    for_both_majors: bool = True,
    as_classifier: bool = False,
) -> str:
    """Write the model card of an export.

    Args:
        part: What was exported.
        recipe: The recipe that made it.
        summary: The metrics of its training.
        chat: How it reads conversations.
        record: What belongs to a reward model; None for policies.
        architecture: Its `model_type`.
        for_both_majors: Whether its config.json says all that transformers 4 needs.
        as_classifier: Whether a reward model's last logit is its score.
    """
    template = chat.template
    arguments = {k: v for k, v in template.arguments.items() if k in template.variables}
    return (
        _environment()
        .get_template("model_card.md.j2")
        .render(
            part=part,
            name=recipe.name,
            base_model=None if recipe.sandbox else public_name(recipe.model.path),
            base_on_hub=recipe.sandbox is None and is_hub_id(recipe.model.path),
            recipe_model=recipe.model,
            segmentation=recipe.segmentation,
            max_length=recipe.data.max_length,
            made_by=f"{MADE_BY} {__version__}",
            record=record,
            cut_fields=recipe.segmentation.deciding(),
            as_classifier=as_classifier,
            trim=_trim(chat),
            arguments="".join(f", {name}={value!r}" for name, value in arguments.items()),
            fixed_day=template.source.removesuffix(template.tokenizer.get_chat_template()),
            architecture=architecture,
            tried=architecture in TRIED,
            versions=VERSIONS,
            for_both_majors=for_both_majors,
            metrics={name: _shown(value) for name, value in summary.items()},
            recipe=to_yaml(_without_paths(recipe_to_dict(recipe))).rstrip(),
        )
    )


def is_hub_id(path: str) -> bool:
    """Whether a model is named as the hub does, and is not a folder here."""
    return bool(path) and public_name(path) == path


def public_name(path: str) -> str:
    """A model's or a file's name for others: a hub id, or the last part of a path."""
    parts = Path(path).expanduser().parts
    for part in parts:  # the hub's cache
        if part.startswith("models--"):
            return part.removeprefix("models--").replace("--", "/")
    local = path.startswith(("/", "~", ".")) or len(parts) > 2 or Path(path).exists()
    return parts[-1] if local and parts else path


def _without_paths(value: Any) -> Any:
    """A recipe's values with absolute paths, which say nothing to others, cut to their names."""
    if isinstance(value, dict):
        return {key: _without_paths(child) for key, child in value.items()}
    if isinstance(value, list):
        return [_without_paths(child) for child in value]
    local = isinstance(value, str) and value.startswith(("/", "~"))
    return public_name(value) if local else value


def _trim(chat: ChatFormat) -> str:
    """The call that trims an answer as the chat template does, if it does."""
    slot = chat.template.skeleton(("user", "assistant"), False).slots[-1]
    calls = {(True, True): ".strip()", (True, False): ".lstrip()", (False, True): ".rstrip()"}
    return calls.get((slot.trim_left, slot.trim_right), "")


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_shown(inner)}" for key, inner in value.items())
    return f"{value:.4g}" if isinstance(value, float) else json.dumps(value)


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("denserl_cli", "core/exports"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
