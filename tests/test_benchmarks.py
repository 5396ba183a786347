"""Scripts in benchmarks/ run seldom: what they take from the package must be there all the same."""

import ast
import importlib
from pathlib import Path
from types import ModuleType

import pytest

SCRIPTS = sorted((Path(__file__).resolve().parents[1] / "benchmarks").glob("*.py"))


OF_EARLIER_TREES = {"denserl_cli.core.ppo.sampling"}
"""What is imported only while a script runs in a tree of before."""


def taken(tree: ast.Module) -> list[tuple[str, str]]:
    """The modules of the project that a script imports from, and each name, in functions too."""
    return [
        (node.module, alias.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module
        if node.module.partition(".")[0] in ("denserl_cli", "benchmarks", "tests")
        for alias in node.names
        if node.module not in OF_EARLIER_TREES
    ]


def found(module: str, name: str) -> object | None:
    """A name of a module, or the module of that name in a folder; None where there is neither."""
    holder = importlib.import_module(module)
    if hasattr(holder, name):
        return getattr(holder, name)
    try:
        return importlib.import_module(f"{module}.{name}")
    except ModuleNotFoundError:
        return None


@pytest.mark.parametrize("script", SCRIPTS, ids=[script.stem for script in SCRIPTS])
def test_what_a_script_takes_from_the_package_is_there(script: Path):
    tree = ast.parse(script.read_text(encoding="utf-8"))
    things = {(module, name): found(module, name) for module, name in taken(tree)}
    missing = [f"{module}.{name}" for (module, name), thing in things.items() if thing is None]
    assert not missing

    modules = {
        alias.asname or alias.name: things[node.module, alias.name]
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if isinstance(things.get((node.module, alias.name)), ModuleType)
    }
    absent = [
        f"{node.value.id}.{node.attr}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
        if node.value.id in modules and not hasattr(modules[node.value.id], node.attr)
    ]
    assert not absent
