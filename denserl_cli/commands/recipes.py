"""`denserl recipes list | show | copy | schema`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from denserl_cli.commands.common import JsonOption, SetOption
from denserl_cli.commands.completion import complete_recipe
from denserl_cli.commands.help import App
from denserl_cli.core.errors import DenserlError

if TYPE_CHECKING:
    from denserl_cli.core.recipe import Recipe

app = App(no_args_is_help=True, help="List, show and copy recipes.")

_COLUMNS = ("recipe", "granularity", "GPUs", "needs", "backbone and purpose")
_LEGEND = (
    "GPUs: of the published training; -: none are recorded, and a sandbox needs none.\n"
    "needs: hub, to download model and data; licence, the same once you accepted it there."
)

NameArgument = Annotated[
    str,
    typer.Argument(metavar="NAME", help="Recipe name or path.", autocompletion=complete_recipe),
]


@app.command("list", epilog="Example: denserl recipes list --json")
def list_(as_json: JsonOption = False) -> None:
    """List the shipped recipes."""
    from denserl_cli.core.recipe import load_recipe
    from denserl_cli.core.recipe.catalog import list_recipes

    recipes = [load_recipe(name) for name in list_recipes()]
    if as_json:
        typer.echo(json.dumps([_record(recipe) for recipe in recipes], ensure_ascii=False))
        return
    from denserl_cli.terminal.console import print_table

    print_table("", _COLUMNS, [_row(recipe) for recipe in recipes])
    typer.echo(_LEGEND)


def _record(recipe: Recipe) -> dict[str, Any]:
    """A recipe as --json lists it; null where there is none."""
    from denserl_cli.core.recipe.catalog import find_recipe

    return {
        "name": recipe.name,
        "description": recipe.description,
        "granularity": recipe.segmentation.granularity,
        "model": recipe.model.path or None,
        "gpus": recipe.recorded.gpus if recipe.recorded else None,
        "needs": _needs(recipe),
        "file": str(find_recipe(recipe.name)),
    }


def _row(recipe: Recipe) -> tuple[object, ...]:
    recorded, backbone = recipe.recorded, recipe.model.path.rpartition("/")[2] or "sandbox"
    return (
        recipe.name,
        recipe.segmentation.granularity,
        str(recorded.gpus) if recorded and recorded.gpus else None,
        _needs(recipe),
        f"{backbone}: {recipe.description}" if recipe.description else backbone,
    )


def _needs(recipe: Recipe) -> str:
    if recipe.recorded is not None and recipe.recorded.gated:
        return "licence"
    return "hub" if recipe.model.path else "nothing"


@app.command("show", epilog="Example: denserl recipes show sandbox-segment --set ppo.gamma=0.99")
def show(
    name: NameArgument,
    overrides: SetOption = None,
    raw: Annotated[bool, typer.Option("--raw", help="The file as written.")] = False,
) -> None:
    """Print a recipe with its base and all defaults filled in."""
    from denserl_cli.core.recipe import load_recipe, recipe_to_yaml
    from denserl_cli.core.recipe.catalog import find_recipe
    from denserl_cli.core.recipe.loader import read_text

    if raw and overrides:
        hint = "leave one of them out"
        raise DenserlError("--raw prints the file as written, without --set", hint=hint)
    if raw:
        typer.echo(read_text(find_recipe(name)), nl=False)
    else:
        typer.echo(recipe_to_yaml(load_recipe(name, overrides or ())), nl=False)


@app.command("schema", epilog="Example: denserl recipes schema > recipe.schema.json")
def schema() -> None:
    """Print the JSON schema of recipes, for editors."""
    from denserl_cli.core.recipe.json_schema import json_schema

    typer.echo(json.dumps(json_schema(), indent=1, ensure_ascii=False))


@app.command("copy", epilog="Example: denserl recipes copy sandbox-segment my-recipe.yaml")
def copy(
    name: NameArgument,
    path: Annotated[Path, typer.Argument(metavar="PATH", help="New file, or a folder.")],
) -> None:
    """Copy a recipe to a file of yours, to change it there."""
    from denserl_cli.core.recipe.catalog import find_recipe
    from denserl_cli.core.recipe.json_schema import with_schema_line
    from denserl_cli.core.recipe.loader import read_text

    source = find_recipe(name)
    text = with_schema_line(read_text(source))
    target = path / source.name if os.path.isdir(path) else path
    try:
        with target.open("xb") as file:
            file.write(text.encode())
    except FileExistsError as error:
        hint = "choose another path, or remove it first"
        raise DenserlError(f"{target} exists already", hint=hint) from error
    except OSError as error:
        if error.filename is None:  # it was made, and the disk is full
            target.unlink(missing_ok=True)
        raise DenserlError(f"cannot write {target}: {error.strerror}") from error
    typer.echo(f"copied to {target}")
