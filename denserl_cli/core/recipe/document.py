"""YAML text to a tree of plain values that know where they stand, and back to text."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import yaml

# The plain scalars of YAML 1.2: `1e-6` is a number, `on`, `1:30` and 2024-07-26 are text.
# An integer of more than 18 digits is text, for no field can mean it.
_PLAIN_SCALARS = (
    ("null", r"null|~|"),
    ("bool", r"true|false|True|False"),
    ("int", r"[-+]?[0-9](_?[0-9]){0,17}"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan"),
)


@dataclass(frozen=True)
class Node:
    """A YAML value and where it stands.

    value: dict[str, Node], list[Node] or a plain scalar. place: `file:line`, or the command-line
    option it comes from. within: whether it is one field of a block, from an option such as
    `--set block.field=value`, and leaves the block's other fields alone.
    """

    value: Any
    place: str
    within: bool = False


class _Loader(yaml.SafeLoader):
    """Knows the plain scalars below and no others."""

    yaml_implicit_resolvers: dict = {}  # noqa: RUF012 - PyYAML's own way to say it


class _Dumper(yaml.SafeDumper):
    """Quotes what either YAML version would take for something else than text."""


for _name, _pattern in _PLAIN_SCALARS:
    for _kind in (_Loader, _Dumper):
        _kind.add_implicit_resolver(
            f"tag:yaml.org,2002:{_name}", re.compile(f"(?:{_pattern})$"), None
        )


def read_document(text: str, place: Callable[[str], str], problems: list[str]) -> Node | None:
    """Parse one YAML document into nodes.

    place: names the place of `line` or `line:column`, counted from 1. problems: receives what is
    wrong with the text.
    Returns None where the text is no YAML, or holds tags or aliases.
    """
    before = len(problems)
    try:
        if "*" in text or "!" in text:  # a parse of its own, so only where it can find something
            _refuse_aliases_and_tags(text, place, problems)
        if len(problems) > before:
            return None
        root = yaml.compose(text, _Loader)
        return _Reader(place, problems).read(root) if root else Node(None, place("1"))
    except yaml.YAMLError as error:
        problems.append(_syntax_problem(error, text, place))
        return None
    except RecursionError:
        problems.append(f"{place('1')}: nested too deeply")
        return None


def _refuse_aliases_and_tags(text: str, place: Callable[[str], str], problems: list[str]) -> None:
    for event in yaml.parse(text, _Loader):
        assert event.start_mark is not None
        here = place(str(event.start_mark.line + 1))
        if isinstance(event, yaml.AliasEvent):
            problems.append(f"{here}: aliases (*{event.anchor}) are not allowed, write it out")
        elif tag := getattr(event, "tag", None):
            problems.append(f"{here}: tags ({tag}) are not allowed, a recipe is plain values")


def _syntax_problem(error: yaml.YAMLError, text: str, place: Callable[[str], str]) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        mark = error.problem_mark
        what = ", ".join(part for part in (error.context, error.problem) if part)
        here = place(f"{mark.line + 1}:{mark.column + 1}")
        return f"{here}: not valid YAML: {what}"
    position = getattr(error, "position", 0)
    line, column = text.count("\n", 0, position) + 1, position - text.rfind("\n", 0, position)
    here = place(f"{line}:{column}")
    return f"{here}: not valid YAML: {getattr(error, 'reason', error)}"


class _Reader:
    """Turns PyYAML's nodes into ours."""

    def __init__(self, place: Callable[[str], str], problems: list[str]) -> None:
        self.place = place
        self.problems = problems

    def read(self, node: yaml.Node, path: str = "", line: int | None = None) -> Node:
        """Convert a node. A value's line is its key's, where it has a key."""
        here = self.place(str(line or node.start_mark.line + 1))
        if isinstance(node, yaml.MappingNode):
            return Node(self._mapping(node, path), here)
        if isinstance(node, yaml.SequenceNode):
            items = [self.read(item, f"{path}[{i}]") for i, item in enumerate(node.value)]
            return Node(items, here)
        return Node(_scalar(node), here)

    def _mapping(self, mapping: yaml.MappingNode, path: str) -> dict[str, Node]:
        children: dict[str, Node] = {}
        for key_node, value_node in mapping.value:
            line = key_node.start_mark.line + 1
            here = self.place(str(line))
            if not isinstance(key_node, yaml.ScalarNode) or not isinstance(_scalar(key_node), str):
                self.problems.append(f"{here}: a key must be text; put it in quotes")
                continue
            key = f"{path}.{key_node.value}" if path else key_node.value
            if key_node.value in children:
                first = children[key_node.value].place
                self.problems.append(f"{here}: duplicate key {key}, first at {first}")
                continue
            children[key_node.value] = self.read(value_node, key, line)
        return children


def _scalar(node: yaml.Node) -> Any:
    kind, text = node.tag.rpartition(":")[2], node.value
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    if kind == "int":
        return int(text)
    if kind == "float":
        return float(text.replace(".inf", "inf").replace(".nan", "nan"))
    return text


def given(value: Any, place: str) -> Node:
    """Make a node of a plain scalar or list that does not come from YAML."""
    if isinstance(value, list):
        return Node([given(item, place) for item in value], place)
    return Node(value, place)


def plain(node: Node) -> Any:
    """Forget the places: nested dicts, lists and scalars."""
    if isinstance(node.value, dict):
        return {key: plain(child) for key, child in node.value.items()}
    if isinstance(node.value, list):
        return [plain(child) for child in node.value]
    return node.value


def to_yaml(value: Any) -> str:
    """Write nested dicts, lists and scalars as YAML that `read_document` reads back."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
