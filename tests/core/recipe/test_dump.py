import json
from dataclasses import replace
from pathlib import Path

from denserl_cli.core.recipe import (
    load_recipe,
    recipe_to_dict,
    recipe_to_yaml,
)
from denserl_cli.core.recipe.defaults import resolved
from denserl_cli.core.recipe.schema import (
    ChatConfig,
    Columns,
    MessageKeys,
    ModelConfig,
    Recipe,
    SegmentationConfig,
    Source,
)

RECIPE = resolved(
    Recipe(
        name="1e6",
        description="yes: é\nand more",
        model=ModelConfig(path="org/model"),
        chat=ChatConfig(template_arguments={"date": "2024-07-26", "n": [1, 1e-7, None]}),
        segmentation=SegmentationConfig(cutoff=1.75),
    )
)


def test_yaml_of_a_recipe_loads_back_to_it(tmp_path: Path):
    mapped = Source(
        "e/f",
        format="nectar",
        columns=Columns(prompt=("a", "b[*].c"), better="d", better_values={"1": "first"}),
        roles={"x": "user"},
        message_keys=MessageKeys("who", "what"),
        pairs="all",
    )
    data = replace(RECIPE.data, prompts=(Source("a/b", weight=0.5), Source("c/d"), mapped))
    for recipe in (RECIPE, replace(RECIPE, data=data)):
        path = tmp_path / "other-name.yaml"
        path.write_text(recipe_to_yaml(recipe), encoding="utf-8")
        assert load_recipe(str(path)) == recipe


def test_a_dict_of_a_recipe_is_plain():
    values = recipe_to_dict(RECIPE)
    assert json.loads(json.dumps(values)) == values
    assert values["optimizer"]["betas"] == [0.9, 0.95]
