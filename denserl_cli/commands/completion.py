"""What a shell proposes at the Tab key; nothing is imported or read that would take time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path


def complete_recipe(incomplete: str) -> list[str]:
    """Names of shipped recipes, then YAML files and the folders on the way to others."""
    from denserl_cli.core.recipe.catalog import list_recipes

    return [*list_recipes(), *_paths(incomplete, lambda path: path.suffix in (".yaml", ".yml"))]


def complete_run(incomplete: str) -> list[str]:
    """Run folders: those in `runs`, and those that the beginning of a path leads to."""
    found = sorted(str(file.parent) for file in Path("runs").glob("*/run.json"))
    others = _paths(incomplete, lambda path: (path / "run.json").is_file())
    return [*found, *(path for path in others if path not in found)]


def _paths(incomplete: str, fits: Callable[[Path], bool]) -> list[str]:
    """Paths beside the typed one that fit, and folders, with a slash, that may hold some."""
    folder = incomplete.rpartition("/")[0] + "/" if "/" in incomplete else ""
    found = []
    for path in sorted(Path(folder or ".").expanduser().glob("*")):
        if fits(path):
            found.append(folder + path.name)
        elif path.is_dir() and not path.name.startswith("."):
            found.append(f"{folder}{path.name}/")
    return found
