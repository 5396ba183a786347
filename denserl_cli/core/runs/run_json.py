"""A run folder's run.json: whose it is, and what is on record of each stage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from denserl_cli.core.errors import DenserlError

SCHEMA = 1
"""Version of run.json."""


def new_book(recipe: str) -> dict[str, Any]:
    """What run.json holds before any stage. recipe: its name."""
    return {"schema": SCHEMA, "recipe": recipe, "stages": {}}


def read_book(file: Path) -> dict[str, Any]:
    """Read run.json: `recipe`, a name, and `stages`, a mapping of entries by stage.

    Raises DenserlError when it is damaged or of another version.
    """
    hint = "name another folder"
    try:
        book = json.loads(file.read_text(encoding="utf-8"))
        owner, stages = book["recipe"], book["stages"]
        if not isinstance(owner, str) or not isinstance(stages, dict):
            raise TypeError("recipe or stages of another kind")
        for name, entry in stages.items():
            if not isinstance(entry["status"], str) or not isinstance(entry["settings"], dict):
                raise TypeError(f"{name} of another kind")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DenserlError(f"{file} is damaged: {error}", hint=hint) from error
    if book.get("schema", SCHEMA) != SCHEMA:
        what = f"schema {book['schema']!r}, this version reads {SCHEMA}"
        raise DenserlError(f"{file}: {what}", hint=hint)
    return book
