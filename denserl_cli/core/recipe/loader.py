"""From a name or path, its bases and the overrides to one checked recipe."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_origin

from denserl_cli.core.errors import DenserlError, RecipeError
from denserl_cli.core.recipe.building import INVALID, SHORT, Builder, field_types
from denserl_cli.core.recipe.catalog import find_recipe
from denserl_cli.core.recipe.checks import Problem, problems
from denserl_cli.core.recipe.defaults import resolved
from denserl_cli.core.recipe.document import Node, given, read_document
from denserl_cli.core.recipe.schema import Recipe, Source

_NOT_INHERITED = ("name", "description")
_RECORDED_ABOUT = {
    "model.path": (
        *("gated", "parameters", "hidden_size", "intermediate_size", "layers", "heads"),
        *("key_value_heads", "vocabulary"),
    ),
    "data.preferences": ("preference_pairs",),
    "data.prompts": ("prompts",),
}
"""What each fact of the `recorded` block is about."""


class Override(NamedTuple):
    """A value that a command-line option other than `--set` puts into the recipe.

    option: the option as typed, for error texts. key: dotted. value: a scalar or a list of such.
    """

    option: str
    key: str
    value: Any


def load_recipe(name_or_path: str, overrides: Sequence[str | Override] = ()) -> Recipe:
    """Load, check and complete a recipe.

    overrides: `a.b=c` with c in YAML, applied in order after the file and its bases.

    Raises:
        RecipeError: everything that is wrong with the recipe, each problem with its place.
        DenserlError: no such recipe, or it cannot be read.
    """
    path = find_recipe(name_or_path)
    found: list[str] = []
    tree = _read_file(path, found)
    layers = [(override, _override(override, found)) for override in overrides]
    if tree is None:
        raise RecipeError(found)
    place, builder = tree.place, Builder()
    tree = merged(Node({"name": Node(path.stem, place)}, place), tree, Recipe)
    for override, layer in layers:
        if layer is not None:
            tree = merged(_still_recorded(tree, layer), layer, Recipe)
        elif isinstance(override, str):
            builder.doubtful.add(override.partition("=")[0].strip())
    return _checked(builder, Node(tree.value, place), found)


def source_from(options: Mapping[str, Any]) -> Source:
    """A source of data from command-line options, checked.

    options: a source's fields by the option that gives them; None: not given.

    Raises:
        RecipeError: all that is wrong with it.
    """
    builder = Builder()
    given_ones = {
        option.removeprefix("--"): Node(value, option)
        for option, value in options.items()
        if value is not None
    }
    source = builder.build(Source, Node(given_ones, "the command line"))
    if builder.problems:
        raise RecipeError(builder.problems)
    return source


def _checked(builder: Builder, tree: Node, found: list[str]) -> Recipe:
    recipe = builder.build(Recipe, tree)
    found += builder.problems
    if recipe is INVALID:
        raise RecipeError(found)
    recipe = resolved(recipe)
    for problem in problems(recipe):
        if not _doubtful(problem, builder.doubtful):
            found.append(_report(tree, problem, tree.place.rpartition(":")[0]))
    if found:
        raise RecipeError(found)
    return recipe


def _read_file(path: Path, found: list[str], children: tuple[Path, ...] = ()) -> Node | None:
    """Read a recipe file and, below it, its base; `children` are the files that led here."""
    label = _label(path)
    text = read_text(path)
    if not text.strip():
        found.append(f"{label}: empty; a recipe is a mapping of blocks")
        return None
    tree = read_document(text, lambda at: f"{label}:{at}", found)
    if tree is None:
        return None
    if not isinstance(tree.value, dict):
        found.append(f"{tree.place}: a recipe is a mapping of blocks, such as `ppo:`")
        return None
    own = Node({k: v for k, v in tree.value.items() if k != "extends"}, f"{label}:1")
    if "extends" not in tree.value:
        return own
    base = _read_base(tree.value["extends"], (*children, path), found)
    if base is None:
        return None
    inherited = {k: v for k, v in base.value.items() if k not in _NOT_INHERITED}
    return merged(_still_recorded(Node(inherited, base.place), own), own, Recipe)


def _read_base(extends: Node, children: tuple[Path, ...], found: list[str]) -> Node | None:
    if not isinstance(extends.value, str):
        found.append(f"{extends.place}: extends: must be the name or path of one recipe")
        return None
    try:
        path = find_recipe(extends.value, children[-1].parent)
        if path.resolve() in [child.resolve() for child in children]:
            circle = " -> ".join(_label(file) for file in (*children, path))
            found.append(f"{extends.place}: extends: a circle: {circle}")
            return None
        return _read_file(path, found, children)
    except DenserlError as error:
        advice = f"; {error.hint}" if error.hint else ""
        found.append(f"{extends.place}: extends: {error.message}{advice}")
        return None


def read_text(path: Path) -> str:
    """Return the text of a recipe file.

    Raises:
        DenserlError: it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        message = f"{_label(path)} is not UTF-8 text (byte {error.start})"
        raise DenserlError(message, hint="save the recipe as UTF-8") from error
    except OSError as error:
        raise DenserlError(f"cannot read {_label(path)}: {error.strerror}") from error


def _label(path: Path) -> str:
    absolute, here = path.absolute(), Path.cwd()
    return str(absolute.relative_to(here) if absolute.is_relative_to(here) else absolute)


def _override(override: str | Override, found: list[str]) -> Node | None:
    if isinstance(override, Override):
        key, node = override.key, given(override.value, override.option)
        return _nested(key.split("."), node)
    key, equals, text = override.partition("=")
    names = key.strip().split(".")
    if not equals or not all(names):
        found.append(f"--set {override}: must be KEY=VALUE, for example --set ppo.kl_coef=0.02")
        return None
    value = read_document(text, lambda _: f"--set {override}", found)
    return value and _nested(names, value)


def _nested(names: Sequence[str], node: Node) -> Node:
    for name in reversed(names):
        node = Node({name: node}, node.place, within=True)
    return node


def merged(base: Node, over: Node, expected: Any = None) -> Node:
    """Lay one tree over another: mappings merge, everything else, lists included, replaces.

    An empty block or mapping replaces, too, so `{}` drops what is inherited.

    Args:
        base: what is inherited.
        over: what is written over it.
        expected: the schema's type; a lone mapping where a list belongs replaces like a list, but
            for a field of it alone (`within`), which goes to the list's only item.
    """
    if over.within and get_origin(expected) is tuple:
        base, expected = _only_item(base, get_args(expected)[0])
    both = isinstance(base.value, dict) and isinstance(over.value, dict)
    empties = not over.value and expected is not Recipe  # a recipe may say `extends` alone
    if not both or empties or get_origin(expected) is tuple:
        return over
    hints: dict[str, Any] = field_types(expected) if is_dataclass(expected) else {}  # type: ignore[arg-type]
    children = dict(base.value)
    for name, child in over.value.items():
        known = name in children
        children[name] = merged(children[name], child, hints.get(name)) if known else child
    return Node(children, over.place)


def _only_item(base: Node, item: Any) -> tuple[Node, Any]:
    """The only item of what is inherited for a list, in full, and the items' type.

    Several items, or none, are returned as they are: no field of theirs can be meant.
    """
    one = base.value[0] if isinstance(base.value, list) and len(base.value) == 1 else base
    if isinstance(one.value, str) and item in SHORT:
        one = Node({SHORT[item]: one}, one.place)
    return one, item


def _still_recorded(base: Node, over: Node) -> Node:
    """The base without the recorded facts about what is about to be replaced."""
    recorded = base.value.get("recorded")
    if recorded is None or not isinstance(recorded.value, dict):
        return base
    stale = {
        fact for key, facts in _RECORDED_ABOUT.items() if _replaces(over, key) for fact in facts
    }
    kept = {name: node for name, node in recorded.value.items() if name not in stale}
    return Node({**base.value, "recorded": Node(kept, recorded.place)}, base.place)


def _replaces(over: Node, key: str) -> bool:
    """Whether a tree gives the key, or empties a block that it is in."""
    node = over
    for part in key.split("."):
        if not node.value:
            return node is not over
        if not isinstance(node.value, dict) or part not in node.value:
            return False
        node = node.value[part]
    return True


def _doubtful(problem: Problem, doubtful: set[str]) -> bool:
    """Whether the judgement rests on a key whose real value is unknown."""
    return any(
        (key + ".").startswith(doubt + ".") or (key + "[").startswith(doubt + "[")
        for key in (problem.key, *problem.rests_on)
        for doubt in doubtful
    )


def _report(tree: Node, problem: Problem, file: str) -> str:
    """Say where a problem is, what it is, and where its value is overridden if it is inherited.

    Args:
        tree: the recipe, every value with its place.
        problem: what makes no sense.
        file: the recipe that was asked for, as places name it.
    """
    places = [_nearest(tree, key) for key in (problem.key, *problem.rests_on)]
    given = [place for place, exact in places if exact] or [places[0][0]]
    value, cause = given[0], min(given, key=lambda place: _distance(place, file))
    text = f"{cause}: {problem.key}: {problem.message}"
    if _distance(cause, file) < _distance(value, file):
        text += f"; the value is from {value}"
    if _distance(value, file) <= _distance(cause, file) < 2:  # it stands where it can be changed
        return text
    if cause.startswith("--"):
        return f"{text}, override it with --set {problem.key.partition('[')[0]}=..."
    return f"{text}{',' if cause != value else ';'} override it in {file}"


def _distance(place: str, file: str) -> int:
    """How far a place is from the user: 0 an option, 1 the recipe asked for, 2 one it extends."""
    if place.startswith("--"):
        return 0
    return 1 if place.rpartition(":")[0] == file else 2


def _nearest(tree: Node, key: str) -> tuple[str, bool]:
    """Return the place of the key or its nearest given parent, and whether it was the key."""
    node = tree
    for part in re.findall(r"[^.\[\]]+", key):
        if isinstance(node.value, list):
            node = node.value[int(part)]
        elif isinstance(node.value, dict) and part in node.value:
            node = node.value[part]
        elif part != "0" and not (part in SHORT.values() and isinstance(node.value, str)):
            return node.place, False
    return node.place, True
