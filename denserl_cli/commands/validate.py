"""`denserl validate`."""

from __future__ import annotations

from typing import Annotated

import typer

from denserl_cli.commands.common import SetOption

EXAMPLE = "Example: denserl validate my-recipe.yaml --set ppo.kl_coef=0.02"


def validate(
    recipe: Annotated[str, typer.Argument(metavar="NAME_OR_PATH", help="Recipe to check.")],
    overrides: SetOption = None,
) -> None:
    """Check a recipe and report all that is wrong with it."""
    from denserl_cli.core.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    typer.echo(f"{loaded.name}: ok")
