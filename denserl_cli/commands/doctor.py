"""`denserl doctor`."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from denserl_cli.commands.common import JsonOption
from denserl_cli.commands.completion import complete_recipe
from denserl_cli.core.errors import DenserlError

EXAMPLE = "Example: denserl doctor --recipe phi3-segment"


def doctor(
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            "-r",
            metavar="NAME_OR_PATH",
            help="Check this recipe alone.",
            autocompletion=complete_recipe,
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Check whether this machine has what denserl needs; the output has nothing private in it."""
    from denserl_cli.core.doctor.checks import diagnose
    from denserl_cli.core.recipe.catalog import list_recipes

    found = diagnose(list_recipes() if recipe is None else [recipe])
    if as_json:
        typer.echo(json.dumps(asdict(found), indent=2, ensure_ascii=False))
    else:
        from denserl_cli.terminal.console import print_table

        for title, facts in found.sections.items():
            print_table("", [title, ""], [[name, value] for name, value in facts.items()])
        rows = [[one.recipe, "\n".join(one.missing) or "nothing"] for one in found.recipes]
        print_table("", ["recipe", "missing here"], rows)
    if found.broken:
        raise DenserlError(
            "denserl cannot work here: " + "; ".join(found.broken),
            hint="install it again: pip install -c constraints.txt .",
        )
