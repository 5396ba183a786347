"""A loaded recipe back to plain values and to YAML."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from denserl_cli.core.recipe.document import to_yaml
from denserl_cli.core.recipe.schema import Recipe


def recipe_to_dict(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe as nested dicts, lists and scalars, ready for JSON or YAML."""
    return _plain(asdict(recipe))


def recipe_to_yaml(recipe: Recipe) -> str:
    """Return YAML that loads back to an equal recipe."""
    return to_yaml(recipe_to_dict(recipe))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(child) for key, child in value.items()}
    return [_plain(child) for child in value] if isinstance(value, list | tuple) else value
