"""A JSON schema of recipes, for editors: types, choices, defaults and the fields' docstrings.

It allows what the loader allows, short forms included; what makes no sense together is left to
`denserl validate`. Editors find it by the first line of a recipe.
"""

from __future__ import annotations

from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from denserl_cli.core.recipe.building import SHORT, field_types, options, short
from denserl_cli.core.recipe.catalog import recipes_folder
from denserl_cli.core.recipe.documentation import docstrings
from denserl_cli.core.recipe.schema import Recipe

FILE = "recipe.schema.json"
"""Its name, beside the shipped recipes."""
MARK = "# yaml-language-server: $schema="
"""How the first line of a recipe begins that names its schema, in the words of editors."""

_SCALARS = {bool: "boolean", int: "integer", float: "number", str: "string", type(None): "null"}


def json_schema() -> dict[str, Any]:
    """Return the schema of a recipe file, as draft 7 of JSON Schema has it."""
    recipe = _object(Recipe)
    recipe["properties"]["extends"] = {
        "type": "string",
        "description": "Name of a shipped recipe, or path of one beside this file, to start from.",
    }
    head = {"$schema": "http://json-schema.org/draft-07/schema#", "title": "A denserl recipe"}
    del recipe["required"]  # its one required field, the name, is the file's where none is given
    blocks = {block.__name__: _object(block) for block in SHORT}
    return {**head, **recipe, "definitions": blocks}


def schema_line(folder: Path | None = None) -> str:
    """Return the line that tells editors where the schema of this installation is.

    folder: where the schema is; None: beside the shipped recipes.
    """
    return f"{MARK}{((folder or recipes_folder()) / FILE).absolute().as_uri()}\n"


def with_schema_line(text: str) -> str:
    """Return a recipe's text whose schema line, if it has one, is right in every folder."""
    if not text.startswith(MARK):
        return text
    return schema_line() + text.partition("\n")[2]


def _object(section: Any) -> dict[str, Any]:
    meaning, documentation = docstrings()[section.__name__]
    properties = {
        field.name: _property(field, field_types(section)[field.name], documentation)
        for field in fields(section)
    }
    required = [f.name for f in fields(section) if f.default is f.default_factory is MISSING]
    found: dict[str, Any] = {"type": "object", "description": meaning, "properties": properties}
    found["additionalProperties"] = False
    return {**found, "required": required} if required else found


def _property(field: Field, expected: Any, documentation: dict[str, str]) -> dict[str, Any]:
    found = _type(expected)
    if field.name in documentation:
        found["description"] = documentation[field.name]
    default = field.default
    if field.default_factory is not MISSING and not is_dataclass(field.default_factory):
        default = field.default_factory()
    if default is not MISSING:
        found["default"] = short(default)
    return found


def _type(expected: Any) -> dict[str, Any]:
    several = options(expected)
    if len(several) > 1:
        return {"anyOf": [_type(option) for option in several]}
    if expected in SHORT:
        block = {"$ref": f"#/definitions/{expected.__name__}"}
        return {"anyOf": [{"type": "string"}, block]}
    if is_dataclass(expected):
        return _object(expected)
    origin, arguments = get_origin(expected), get_args(expected)
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin is tuple:
        return _list(arguments)
    if origin is dict:
        return {"type": ["object", "null"]}
    return {"type": _SCALARS[expected]}


def _list(arguments: tuple[Any, ...]) -> dict[str, Any]:
    items = _type(arguments[0])
    array: dict[str, Any] = {"type": "array", "items": items}
    if ... not in arguments:
        array.update(minItems=len(arguments), maxItems=len(arguments))
    return {"anyOf": [array, *items["anyOf"]]} if arguments[0] in SHORT else array
