"""Recipes found by name or path."""

from __future__ import annotations

import os
from difflib import get_close_matches
from pathlib import Path

from denserl_cli.core.errors import DenserlError

_PACKAGE = Path(__file__).resolve().parents[2]


def recipes_folder() -> Path:
    """Return the folder of the shipped recipes: in the installed package, or in the checkout."""
    installed = _PACKAGE / "shipped_recipes"
    return installed if installed.is_dir() else _PACKAGE.parent / "recipes"


def list_recipes() -> list[str]:
    """Return the names of the shipped recipes, in alphabetical order."""
    return sorted(path.stem for path in recipes_folder().glob("*.yaml"))


def find_recipe(name: str, folder: Path | None = None) -> Path:
    """Return the file of a shipped recipe or, where no such name is shipped, of a path.

    folder: what a relative path is relative to; the current directory by default.

    Raises:
        DenserlError: there is no such recipe, or it is a folder.
    """
    names = list_recipes()
    if name in names:
        return recipes_folder() / f"{name}.yaml"
    path = (folder or Path()) / os.path.expanduser(name)
    if os.path.isfile(path):
        return path
    if os.path.isdir(path) and name:
        raise DenserlError(f"{name} is a folder, not a recipe", hint="name a YAML file in it")
    near = get_close_matches(Path(name).stem, names, 3)
    guess = f"did you mean {' or '.join(near)}? " if near else ""
    hint = f"{guess}`denserl recipes list` shows the shipped ones; a path to a YAML file works too"
    raise DenserlError(f"no recipe {name!r}, neither a shipped name nor a file", hint=hint)
