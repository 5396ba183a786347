"""Fields of a recipe by their dotted names, such as `ppo.micro_batch_size`."""

from __future__ import annotations

from collections.abc import Mapping
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
        block, name = field.split(".")
        changed = replace(getattr(recipe, block), **{name: value})
        recipe = replace(recipe, **{block: changed})
    return recipe
