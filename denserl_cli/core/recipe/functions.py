"""The reward functions that a recipe names, found without running anybody's code."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from difflib import get_close_matches
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

PREFIX = "python:"
GROUP = "denserl.rewards"
"""Entry points of installed packages that offer rewards."""


def short_name(function: str) -> str:
    """What metrics call a reward: the last part of its name."""
    return _dotted(function).rpartition(".")[2]


def module_and_name(function: str) -> tuple[str, str] | None:
    """The two parts of `python:module.function` (or `:function`); None for anything else."""
    module, _, name = _dotted(function).rpartition(".")
    parts = [*module.split("."), name]
    return (module, name) if all(part.isidentifier() for part in parts) else None


def _dotted(function: str) -> str:
    return function.removeprefix(PREFIX).replace(":", ".")


def installed(function: str) -> EntryPoint | None:
    """The entry point of this name, if some package has one."""
    return next(iter(entry_points(group=GROUP, name=function)), None)


def see_current_folder() -> None:
    """Let modules in the current directory be found, after everything that is installed."""
    importlib.invalidate_caches()  # a file may be newer than what Python knows of its folder
    here = str(Path.cwd())
    if not {here, ""} & set(sys.path):
        sys.path.append(here)


def why_not(function: str) -> str | None:
    """What is wrong with the name of a reward function; None when there seems to be one.

    Modules are found and read, not run.
    """
    if not function.startswith(PREFIX):
        return None if installed(function) else _not_installed(function)
    found = module_and_name(function)
    if found is None:
        return f"{function!r} is not {PREFIX}module.function"
    module, name = found
    if module.partition(".")[0] in sys.builtin_module_names:
        return None
    spec = _spec(module)
    if spec is None:
        return f"no module {module} in the current directory or on Python's path"
    if spec.origin is None or not spec.origin.endswith(".py"):
        return None if spec.origin else f"{module} is a folder of modules; name one of them"
    return _no_such_name(Path(spec.origin), name)


def _not_installed(function: str) -> str:
    names = sorted(entry_points(group=GROUP).names)
    there = f"; there are {', '.join(names)}" if names else ""
    return (
        f"no installed reward is called {function!r}{there}; a function of your own is "
        f"{PREFIX}module.function"
    )


def _spec(module: str) -> ModuleSpec | None:
    """Where a module is; the packages around it are not imported."""
    see_current_folder()
    top, *inner = module.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except ValueError:  # imported already, from nowhere
        spec = None
    for name in inner:
        if spec is None or spec.submodule_search_locations is None:
            return None
        spec = PathFinder.find_spec(f"{spec.name}.{name}", list(spec.submodule_search_locations))
    return spec


def _no_such_name(file: Path, name: str) -> str | None:
    """What is wrong with a source file that should hold a function; None when it may do."""
    try:
        tree = ast.parse(file.read_bytes())
    except SyntaxError as error:
        return f"{file}:{error.lineno}: {error.msg}"
    except (OSError, ValueError) as error:
        return f"{file} cannot be read: {error}"
    names = set(_names(tree))
    if name in names or names & {"*", "__getattr__"}:
        return None
    near = get_close_matches(name, names, 1)
    return f"no {name} in {file}" + (f", did you mean {near[0]}?" if near else "")


def _names(tree: ast.AST) -> Iterator[str]:
    """Every name that a module may bind at its top level."""
    for node in ast.iter_child_nodes(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                yield name
            case ast.ClassDef(name=name):
                yield name
            case ast.Import(names=aliases) | ast.ImportFrom(names=aliases):
                yield from (alias.asname or alias.name.partition(".")[0] for alias in aliases)
            case ast.Name(id=name, ctx=ast.Store()):
                yield name
            case _:
                yield from _names(node)
