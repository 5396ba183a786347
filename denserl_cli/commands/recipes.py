"""`denserl recipes list | show | copy`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from denserl_cli.commands.help import App
from denserl_cli.core.errors import DenserlError

if TYPE_CHECKING:
    from denserl_cli.core.recipe import Recipe

app = App(no_args_is_help=True, help="List, show and copy the shipped recipes.")

_COLUMNS = ("recipe", "granularity", "GPUs", "needs", "backbone and purpose")
_LEGEND = (
    "GPUs: of the published training; -: none are recorded, and a sandbox needs none.\n"
    "needs: hub, to download model and data; licence, the same once you accepted it there."
)

NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="Recipe name or path.")]


@app.command("list", epilog="Example: denserl recipes list")
def list_() -> None:
    """List the shipped recipes."""
    from denserl_cli.core.recipe import load_recipe
    from denserl_cli.core.recipe.catalog import list_recipes
    from denserl_cli.terminal.console import print_table

    print_table("", _COLUMNS, [_row(load_recipe(name)) for name in list_recipes()])
    typer.echo(_LEGEND)


def _row(recipe: Recipe) -> tuple[object, ...]:
    recorded = recipe.recorded
    needs = "hub" if recipe.model.path else "nothing"
    if recorded is not None and recorded.gated:
        needs = "licence"
    backbone = recipe.model.path.rpartition("/")[2] or "sandbox"
    return (
        recipe.name,
        recipe.segmentation.granularity,
        str(recorded.gpus) if recorded and recorded.gpus else None,
        needs,
        f"{backbone}: {recipe.description}" if recipe.description else backbone,
    )


@app.command("show", epilog="Example: denserl recipes show sandbox-segment")
def show(
    name: NameArgument,
    raw: Annotated[bool, typer.Option("--raw", help="The file as written.")] = False,
) -> None:
    """Print a recipe with its base and all defaults filled in."""
    from denserl_cli.core.recipe import load_recipe, recipe_to_yaml
    from denserl_cli.core.recipe.catalog import find_recipe
    from denserl_cli.core.recipe.loader import read_text

    text = read_text(find_recipe(name)) if raw else recipe_to_yaml(load_recipe(name))
    typer.echo(text, nl=False)


@app.command("copy", epilog="Example: denserl recipes copy sandbox-segment my-recipe.yaml")
def copy(
    name: NameArgument,
    path: Annotated[Path, typer.Argument(metavar="PATH", help="New file, or a folder.")],
) -> None:
    """Copy a recipe to a file of yours, to change it there."""
    from denserl_cli.core.recipe.catalog import find_recipe

    source = find_recipe(name)
    target = path / source.name if os.path.isdir(path) else path
    try:
        with target.open("xb") as file:
            file.write(source.read_bytes())
    except FileExistsError as error:
        hint = "choose another path, or remove it first"
        raise DenserlError(f"{target} exists already", hint=hint) from error
    except OSError as error:
        if error.filename is None:  # it was made, and the disk is full
            target.unlink(missing_ok=True)
        raise DenserlError(f"cannot write {target}: {error.strerror}") from error
    typer.echo(f"copied to {target}")
