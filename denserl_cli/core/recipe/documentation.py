"""The docstrings of the schema's classes and fields, read from its source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path

from denserl_cli.core.recipe import schema


@cache
def docstrings() -> dict[str, tuple[str, dict[str, str]]]:
    """Return, for each schema class, its own docstring and those of its fields."""
    module = ast.parse(Path(schema.__file__).read_text(encoding="utf-8"))
    classes = [node for node in module.body if isinstance(node, ast.ClassDef)]
    return {node.name: (ast.get_docstring(node) or "", dict(_fields(node))) for node in classes}


def _fields(section: ast.ClassDef) -> Iterator[tuple[str, str]]:
    for field, following in pairwise(section.body):
        match field, following:
            case ast.AnnAssign(target=ast.Name(name)), ast.Expr(ast.Constant(str(text))):
                yield name, text
