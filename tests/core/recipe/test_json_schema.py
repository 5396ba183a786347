import json
from pathlib import Path

import pytest

from denserl_cli.core.recipe.building import known_keys
from denserl_cli.core.recipe.catalog import list_recipes, recipes_folder
from denserl_cli.core.recipe.document import plain, read_document
from denserl_cli.core.recipe.json_schema import FILE, MARK, json_schema, with_schema_line

TYPES = {
    "object": dict,
    "array": list,
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "null": type(None),
}


def resolved(schema: dict) -> dict:
    """A schema, or the definition that it refers to."""
    if "$ref" not in schema:
        return schema
    return json_schema()["definitions"][schema["$ref"].removeprefix("#/definitions/")]


def fits(value: object, schema: dict) -> bool:
    """What editors check, for the words that our schema uses."""
    schema = resolved(schema)
    if "anyOf" in schema:
        return any(fits(value, option) for option in schema["anyOf"])
    if "enum" in schema:
        return value in schema["enum"]
    kinds = [schema["type"]] if isinstance(schema["type"], str) else schema["type"]
    if not any(
        isinstance(value, TYPES[kind]) and isinstance(value, bool) == (kind == "boolean")
        for kind in kinds
    ):
        return False
    if isinstance(value, list):
        least, most = schema.get("minItems", 0), schema.get("maxItems", len(value))
        return least <= len(value) <= most and all(fits(one, schema["items"]) for one in value)
    if isinstance(value, dict) and "properties" in schema:
        known = schema["properties"]
        return set(schema.get("required", ())) <= set(value) <= set(known) and all(
            fits(one, known[name]) for name, one in value.items()
        )
    return True


def written(text: str) -> object:
    problems: list[str] = []
    node = read_document(text, str, problems)
    assert node is not None and problems == []
    return plain(node)


def test_the_shipped_schema_is_current():
    text = (recipes_folder() / FILE).read_text(encoding="utf-8")
    assert json.loads(text) == json_schema(), "run: make docs"


@pytest.mark.parametrize("name", list_recipes())
def test_every_shipped_recipe_names_the_schema_and_fits_it(name: str):
    text = (recipes_folder() / f"{name}.yaml").read_text(encoding="utf-8")
    assert text.startswith(f"{MARK}{FILE}\n")
    assert fits(written(text), json_schema())


@pytest.mark.parametrize(
    "text",
    [
        "data: {preferences: a/b, prompts: [a/b, {path: c/d, weight: 2}]}",
        "data: {preferences: {path: a/b}}",
        "ppo: {rewards: true_reward, kl_target: null}",
        "segmentation: {cutoff: auto}",
        "segmentation: {cutoff: 1}",
        "chat: {template_arguments: null}",
        "sandbox: null\nlora: {}\noptimizer: {betas: [0, 1e-1]}",
        "extends: phi3-segment",
    ],
)
def test_short_forms_fit(text: str):
    assert fits(written(text), json_schema())


@pytest.mark.parametrize(
    "text",
    [
        "ppo: {kl_coeff: 1}",
        "seed: true",
        "seed: 1.5",
        "data: {preferences: [{split: train}]}",
        "segmentation: {cutoff: high}",
        "segmentation: {granularity: word}",
        "optimizer: {betas: [0.9]}",
        "ppo: null",
    ],
)
def test_mistakes_do_not(text: str):
    assert not fits(written(text), json_schema())


def test_every_field_is_described():
    def names(schema: dict, prefix: str = ""):
        for option in map(resolved, schema.get("anyOf", [schema])):
            for name, one in option.get("properties", {}).items():
                yield prefix + name, one
                yield from names(one, f"{prefix}{name}.")

    found = dict(names(json_schema()))
    leaves = {key for key in known_keys() if not any(k.startswith(f"{key}.") for k in known_keys())}
    assert set(known_keys()) <= set(found)
    assert all(len(found[key]["description"]) > 5 for key in leaves)


def test_a_copied_recipe_names_a_schema_that_is_there():
    text = with_schema_line(f"{MARK}{FILE}\nseed: 1\n")
    first, rest = text.split("\n", 1)
    assert Path(first.removeprefix(f"{MARK}file://")).is_file() and rest == "seed: 1\n"
    assert with_schema_line("# mine\n") == "# mine\n"
