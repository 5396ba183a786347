"""A loaded recipe back to plain values, to YAML, and against another one."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
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


def recipe_differences(
    old: Recipe, new: Recipe, blocks: Collection[str] | None = None
) -> list[str]:
    """Return `dotted.key: old -> new` for every field in which two recipes differ.

    blocks: top-level names to compare; by default all but `description`, which changes no number.
    """
    before, after = (dict(_leaves(recipe_to_dict(recipe))) for recipe in (old, new))
    return [
        f"{key}: {before.get(key, 'absent')} -> {after.get(key, 'absent')}"
        for key in {**before, **after}
        if before.get(key) != after.get(key) and _compared(key, blocks)
    ]


def _compared(key: str, blocks: Collection[str] | None) -> bool:
    block = key.partition(".")[0]
    return block != "description" if blocks is None else block in blocks


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(child) for key, child in value.items()}
    return [_plain(child) for child in value] if isinstance(value, list | tuple) else value


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for name, child in value.items():
            yield from _leaves(child, f"{key}.{name}" if key else name)
    elif isinstance(value, list) and any(isinstance(child, dict) for child in value):
        for place, child in enumerate(value):
            yield from _leaves(child, f"{key}[{place}]")
    else:
        yield key, json.dumps(value, ensure_ascii=False)
