"""Nodes of a document to the schema's dataclasses, with every misfit collected."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import MISSING, fields, is_dataclass
from difflib import get_close_matches
from functools import cache
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from denserl_cli.core.recipe.document import Node, plain
from denserl_cli.core.recipe.moved import moved
from denserl_cli.core.recipe.schema import Recipe, RewardSource, Source

INVALID = object()
"""Stands for a value that did not fit; the problem is recorded."""

SHORT = {Source: "path", RewardSource: "source"}
"""Blocks that may be given as a text, and the field which that is; their lists as a single one."""
_NAMED = {Source: "source", RewardSource: "reward"}
MOST_NAMED = 20
"""Keys of a block that a message lists; of a larger block it names the page."""
_SCALARS = {bool: "true or false", int: "an integer", float: "a number", str: "text"}


class Builder:
    """Builds dataclasses from nodes.

    problems: what did not fit, each `place: what, what to do`. doubtful: dotted keys whose real
    value is unknown because of such a problem; nothing that rests on them can be judged.
    """

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.doubtful: set[str] = set()

    def build(self, expected: Any, node: Node, key: str = "") -> Any:
        """Return the node's value as the type `expected`, or INVALID after recording why not."""
        if node.value is None and type(None) in options(expected):
            return None
        allowed, expected = expected, _option(expected, node.value)
        if is_dataclass(expected):
            return self._section(expected, node, key)
        origin = get_origin(expected)
        if origin is tuple:
            return self._list(expected, node, key)
        if origin is Literal:
            return self._choice(expected, node, key, allowed)
        if origin is dict and isinstance(node.value, dict | None):
            return plain(node) or {}
        return self._scalar(expected, node, key)

    def reject(self, node: Node, key: str, message: str) -> Any:
        """Record that the node does not fit at `key`."""
        self.doubtful.add(key)
        self.problems.append(f"{node.place}: {f'{key}: ' if key else ''}{message}")
        return INVALID

    def _section(self, section: Any, node: Node, key: str) -> Any:
        if section in SHORT and isinstance(node.value, str):
            return section(**{SHORT[section]: node.value})
        if not isinstance(node.value, dict):
            advice = "; write {} for its defaults" if node.value is None else ""
            message = f"must be {describe(section)}, not {_found(node)}{advice}"
            return self.reject(node, key, message)
        hints, values = field_types(section), {}
        for name, child in node.value.items():
            path = _join(key, name)
            if name not in hints:
                self._unknown(child, key, name, hints, node)
            elif (value := self.build(hints[name], child, path)) is not INVALID:
                values[name] = value
        required = [f.name for f in fields(section) if f.default is f.default_factory is MISSING]
        for name in required:
            if name not in node.value and _join(key, name) not in self.doubtful:
                self.reject(node, _join(key, name), "missing")
        return section(**values) if set(required) <= set(values) else INVALID

    def _list(self, expected: Any, node: Node, key: str) -> Any:
        item, *rest = get_args(expected)
        single = item in SHORT and isinstance(node.value, str | dict)
        items = [node] if single else node.value
        if not isinstance(items, list) or (rest != [...] and len(items) != len(rest) + 1):
            return self.reject(node, key, f"must be {describe(expected)}, not {_found(node)}")
        built = [self.build(item, child, f"{key}[{i}]") for i, child in enumerate(items)]
        return INVALID if INVALID in built else tuple(built)

    def _choice(self, expected: Any, node: Node, key: str, allowed: Any) -> Any:
        choices = get_args(expected)
        if node.value in choices and type(node.value) is not bool:
            return node.value
        near = get_close_matches(str(node.value), map(str, choices), 1)
        message = f"must be {describe(allowed)}, not {_found(node)}"
        return self.reject(node, key, message + did_you_mean(near))

    def _scalar(self, expected: Any, node: Node, key: str) -> Any:
        value = node.value
        if expected is float and type(value) is int:
            value = float(value)
        if type(value) is not expected:
            advice = "; put it in quotes" if expected is str and type(value) in _SCALARS else ""
            message = f"must be {describe(expected)}, not {_found(node)}{advice}"
            return self.reject(node, key, message)
        if expected is float and not math.isfinite(value):
            return self.reject(node, key, f"must be a finite number, not {value}")
        return value

    def _unknown(
        self, node: Node, block: str, name: str, siblings: Collection[str], parent: Node
    ) -> None:
        if (now := moved(block, parent, name)) is not None:
            key, value = now
            self.doubtful.add(key)
            message = f"{_join(block, name)} is {key} now; write {key}: {value}"
            self.problems.append(f"{node.place}: {message}")
            return
        if "." in name:
            message = f"unknown key {name!r}; dots are for --set, nest the blocks here"
            self.problems.append(f"{node.place}: {message}")
            return
        near = _near_keys(block, name, siblings)
        self.doubtful.update(near)
        advice = did_you_mean(near) or _known_here(block, siblings)
        self.problems.append(f"{node.place}: unknown key {_join(block, name)}{advice}")


def short(default: Any) -> Any:
    """A default as a recipe would write it: a block that may be a text is that text."""
    if isinstance(default, tuple):
        return [short(one) for one in default]
    return getattr(default, SHORT[type(default)]) if type(default) in SHORT else default


def _near_keys(block: str, name: str, siblings: Collection[str]) -> list[str]:
    """Return the dotted keys that an unknown one may mean: of its own block, or of another."""
    leaves: dict[str, list[str]] = {}
    for key in known_keys():
        leaves.setdefault(key.rpartition(".")[2], []).append(key)
    if near := get_close_matches(name, siblings, 1, cutoff=0.75):
        return [_join(block, near[0])]
    if near := get_close_matches(name, leaves, 1, cutoff=0.8):
        return leaves[near[0]]
    return [_join(block, near) for near in get_close_matches(name, siblings, 1)]


def _known_here(block: str, siblings: Collection[str]) -> str:
    """Return what a block holds, for an unknown key that is like no known one."""
    named = f"; {block or 'a recipe'} has "
    if len(siblings) > MOST_NAMED:
        return f"{named}{len(siblings)} keys, see docs/recipes.md"
    return named + ", ".join(siblings)


def _option(expected: Any, value: Any) -> Any:
    """The member of a union that a value is meant for: a text goes to a choice of words."""
    some = [option for option in options(expected) if option is not type(None)]
    kinds: dict[type, Any] = {str: Literal, list: tuple, dict: dict}
    wanted = kinds.get(type(value))
    fitting = [option for option in some if wanted and get_origin(option) is wanted]
    return fitting[0] if fitting else some[0]


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def options(expected: Any) -> tuple[Any, ...]:
    """Return the members of a union, or the type itself."""
    return get_args(expected) if get_origin(expected) in (Union, UnionType) else (expected,)


@cache
def field_types(section: Any) -> dict[str, Any]:
    """Return the fields of a schema class with their types."""
    return get_type_hints(section)


@cache
def known_keys(section: Any = Recipe, prefix: str = "") -> tuple[str, ...]:
    """Return the dotted names of all blocks and fields."""
    return tuple(_walk_keys(section, prefix))


def _walk_keys(section: Any, prefix: str) -> Iterator[str]:
    for name, expected in field_types(section).items():
        yield _join(prefix, name)
        for option in filter(is_dataclass, options(expected)):
            yield from _walk_keys(option, _join(prefix, name))


def did_you_mean(near: Sequence[str]) -> str:
    """Return `, did you mean a or b?`, or nothing where nothing is near."""
    return f", did you mean {' or '.join(near)}?" if near else ""


def describe(expected: Any) -> str:
    """Name a field's type the way error messages and the reference do."""
    if len(options(expected)) > 1:
        named = [describe(option) for option in options(expected) if option is not type(None)]
        return " or ".join([*named, "null"] if type(None) in options(expected) else named)
    if is_dataclass(expected):
        return f"a {_NAMED[expected]}" if expected in SHORT else "a block of settings"
    origin, arguments = get_origin(expected), get_args(expected)
    if origin is Literal and len(arguments) == 1:
        return str(arguments[0])
    if origin is Literal:
        return f"{', '.join(map(str, arguments[:-1]))} or {arguments[-1]}"
    if origin is tuple:
        plurals = {str: "texts", float: "numbers", Source: "sources", RewardSource: "rewards"}
        several = plurals.get(arguments[0]) or describe(arguments[0])
        return f"a list of {'' if ... in arguments else f'{len(arguments)} '}{several}"
    return _SCALARS.get(expected, "a mapping")


def _found(node: Node) -> str:
    value = node.value
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return f"the text {value!r}" if isinstance(value, str) else f"the number {value}"
