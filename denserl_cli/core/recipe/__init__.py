"""Recipes: one YAML file an experiment, frozen dataclasses behind it."""

from denserl_cli.core.recipe.dump import recipe_to_dict, recipe_to_yaml
from denserl_cli.core.recipe.loader import load_recipe
from denserl_cli.core.recipe.schema import Recipe

__all__ = ["Recipe", "load_recipe", "recipe_to_dict", "recipe_to_yaml"]
