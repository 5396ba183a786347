"""Fields of a recipe by their dotted names, such as `ppo.micro_batch_size`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from denserl_cli.core.recipe.schema import Recipe


def value_of(recipe: Recipe, field: str) -> Any:
    """The value of a field; None where its block is absent."""
    value: Any = recipe
    for name in field.split("."):
        value = getattr(value, name, None)
    return value


def with_values(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    """The recipe with other values in fields of its blocks, each `block.name`."""
    for field, value in values.items():
        recipe = _with_value(recipe, field.split("."), value)
    return recipe


def _with_value(block: Any, names: Sequence[str], value: Any) -> Any:
    """The block with another value in a field of its own, or of a block in it."""
    name, *inner = names
    changed = _with_value(getattr(block, name), inner, value) if inner else value
    return replace(block, **{name: changed})
