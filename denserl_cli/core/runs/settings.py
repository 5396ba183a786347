"""Settings by dotted name: those that a stage reads, and how two records of them differ."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

from denserl_cli.core.recipe import Recipe, recipe_to_dict
from denserl_cli.core.recipe.stages import CHANGEABLE, STAGES


def stage_settings(recipe: Recipe, stage: str) -> dict[str, Any]:
    """The settings of a recipe that a stage reads, by dotted name."""
    return {
        key: value
        for key, value in flat(recipe_to_dict(recipe)).items()
        if any(key == name or key.startswith(name + ".") for name in STAGES[stage].reads)
    }


def result_settings(recipe: Recipe, stage: str) -> dict[str, Any]:
    """The settings that decide a stage's results: without those for memory and rounding alone."""
    settings = stage_settings(recipe, stage)
    return {key: value for key, value in settings.items() if key not in CHANGEABLE}


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested mapping as one by dotted names; empty mappings leave no name."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


def differences(
    old: Mapping[str, Any], new: Mapping[str, Any], ignored: Collection[str] = ()
) -> list[str]:
    """What differs between two flat mappings, as `key was X, is Y`, sorted by key.

    Values are compared as JSON, so a tuple equals the list that it was written as.
    """
    found = []
    for key in sorted({*old, *new}.difference(ignored)):
        before, now = json.dumps(old.get(key)), json.dumps(new.get(key))
        if before != now:
            found.append(f"{key} was {before}, is {now}")
    return found
