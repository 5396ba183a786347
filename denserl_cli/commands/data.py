"""`denserl data`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from denserl_cli.commands.common import JsonOption, SetOption
from denserl_cli.commands.completion import complete_recipe
from denserl_cli.commands.help import RECIPE
from denserl_cli.core.errors import DenserlError

if TYPE_CHECKING:
    from denserl_cli.core.inspection.data_report import DataReport

EXAMPLE = "Example: denserl data pairs.jsonl --recipe phi3-segment"


def data(
    path: Annotated[
        str | None,
        typer.Argument(
            metavar="PATH_OR_HUB_NAME", help="Data to look at; without it, the recipe's own."
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            "-r",
            metavar="NAME_OR_PATH",
            help="Its tokenizer and limits.",
            autocompletion=complete_recipe,
            rich_help_panel=RECIPE,
        ),
    ] = None,
    overrides: SetOption = None,
    form: Annotated[
        str | None, typer.Option("--format", metavar="NAME", help="Known layout of the rows.")
    ] = None,
    split: Annotated[str | None, typer.Option("--split", help="Split to read.")] = None,
    subset: Annotated[str | None, typer.Option("--subset", help="Hub configuration.")] = None,
    prompts: Annotated[
        bool, typer.Option("--prompts", help="Read prompts for train-ppo, not pairs.")
    ] = False,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Look at so many rows, drawn with a seed.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show what data hold and what becomes of each row, before any model is loaded."""
    from dataclasses import replace

    from denserl_cli.core.inspection.data_report import report_sources
    from denserl_cli.core.recipe import load_recipe
    from denserl_cli.core.recipe.loader import source_from

    if path is None and recipe is None:
        raise DenserlError("nothing to look at", hint="name data, or a recipe with --recipe")
    loaded = load_recipe(recipe, overrides or ()) if recipe else None
    source = None
    if path is not None:
        options = {"path": path, "--format": form, "--split": split, "--subset": subset}
        source = replace(source_from(options), max_samples=limit)
    reports = report_sources(loaded, source, prompts_only=prompts)
    _show(list(reports), as_json)


def _show(reports: list[DataReport], as_json: bool) -> None:
    from denserl_cli.terminal.data_report import data_report_lines

    if as_json:
        typer.echo(json.dumps([report.document() for report in reports], default=str))
        return
    for number, report in enumerate(reports):
        typer.echo("\n" * (number > 0), nl=False)
        for line in data_report_lines(report):
            typer.echo(line)
