"""`denserl validate`."""

from __future__ import annotations

from typing import Annotated

import typer

from denserl_cli.commands.common import SetOption
from denserl_cli.commands.completion import complete_recipe
from denserl_cli.core.errors import DenserlError

EXAMPLE = "Example: denserl validate sandbox-segment --set ppo.kl_coef=0.03"


def validate(
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="NAME_OR_PATH", help="Recipe to check.", autocompletion=complete_recipe
        ),
    ],
    overrides: SetOption = None,
) -> None:
    """Check a recipe, its model's config.json and the first rows of its files."""
    from denserl_cli.core.models.architecture import check_local_model
    from denserl_cli.core.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    data = loaded.data
    if data.preferences or data.evaluation or data.prompts:
        from denserl_cli.core.data.local_rows import first_rows_problems

        if problems := list(first_rows_problems(loaded)):
            raise DenserlError("\n".join(problems), hint="`denserl data PATH` shows what is there")
    check_local_model(loaded)
    typer.echo(f"{loaded.name}: ok")
