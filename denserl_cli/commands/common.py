"""The options that commands share, and how they reach the recipe."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from denserl_cli.commands.completion import complete_recipe, complete_run
from denserl_cli.commands.help import PROCESSES, RECIPE, RUN
from denserl_cli.core.errors import DenserlError

if TYPE_CHECKING:
    from denserl_cli.core.recipe import Recipe
    from denserl_cli.core.recipe.loader import Override
    from denserl_cli.launch.launcher import Mode

RecipeOption = Annotated[
    str,
    typer.Option(
        "--recipe",
        "-r",
        metavar="NAME_OR_PATH",
        help="Shipped recipe or YAML file.",
        autocompletion=complete_recipe,
        rich_help_panel=RECIPE,
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override one field; may be repeated.",
        rich_help_panel=RECIPE,
    ),
]
PreferencesOption = Annotated[
    str | None,
    typer.Option(
        "--data",
        metavar="PATH_OR_HUB_NAME",
        help="Preference pairs to use.",
        rich_help_panel=RECIPE,
    ),
]
PromptsOption = Annotated[
    str | None,
    typer.Option(
        "--data", metavar="PATH_OR_HUB_NAME", help="Prompts to use.", rich_help_panel=RECIPE
    ),
]
ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="PATH_OR_HUB_NAME",
        help="Starting model to use.",
        rich_help_panel=RECIPE,
    ),
]

OutOption = Annotated[
    Path | None,
    typer.Option(
        "--out",
        "-o",
        metavar="DIR",
        help="Run folder; runs/<recipe name> without it.",
        autocompletion=complete_run,
        rich_help_panel=RUN,
    ),
]
ResumeOption = Annotated[
    bool | None,
    typer.Option(
        "--resume/--fresh",
        help="Continue an interrupted run, or start it over.",
        rich_help_panel=RUN,
    ),
]
DryRunOption = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Print the resolved recipe and the plan, and stop.",
        rich_help_panel=RUN,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]

ProcessesOption = Annotated[
    int | None,
    typer.Option(
        "--processes",
        "--gpus",
        "-n",
        min=1,
        metavar="N",
        help="Processes on this machine; one for each GPU without it.",
        rich_help_panel=PROCESSES,
    ),
]
NodesOption = Annotated[
    int,
    typer.Option(
        "--nodes",
        min=1,
        metavar="N",
        help="Machines that work together.",
        rich_help_panel=PROCESSES,
    ),
]
NodeRankOption = Annotated[
    int | None,
    typer.Option(
        "--node-rank",
        metavar="K",
        help="Number of this machine, from 0.",
        rich_help_panel=PROCESSES,
    ),
]
RendezvousOption = Annotated[
    str | None,
    typer.Option(
        "--rendezvous",
        metavar="HOST:PORT",
        help="Where several machines meet.",
        rich_help_panel=PROCESSES,
    ),
]
HostfileOption = Annotated[
    Path | None,
    typer.Option(
        "--hostfile",
        metavar="FILE",
        help="Machines to start on through ssh: lines of NAME slots=N.",
        rich_help_panel=PROCESSES,
    ),
]


def read_mode(resume: bool | None) -> Mode:
    """Name what `--resume/--fresh` asks for."""
    if resume is None:
        return "start"
    return "resume" if resume else "fresh"


def read_recipe(
    stage: str,
    recipe: str,
    overrides: Sequence[str] | None,
    *,
    data: str | None = None,
    model: str | None = None,
) -> Recipe:
    """Load the recipe for a stage with `--data`, `--model` and then `--set` applied.

    Args:
        stage: A stage of training, `segment` or an evaluation (`recipe.stages`).
        recipe: Name of a shipped recipe, or a file.
        overrides: `KEY=VALUE` of each `--set`.
        data: What `--data` names.
        model: What `--model` names.

    Raises:
        DenserlError: The recipe or an option is wrong, or the stage has no data to read.
    """
    from denserl_cli.core.recipe import load_recipe
    from denserl_cli.core.recipe.stages import STAGES

    shorthands = _shorthands(stage, data, model)
    loaded = load_recipe(recipe, [*shorthands, *(overrides or ())])
    field = STAGES[stage].data
    missing = loaded.sandbox is None and not getattr(loaded.data, field)
    if missing and STAGES[stage].needs_data:
        raise DenserlError(
            f"recipe {loaded.name} names no data.{field}, which {stage} needs",
            hint=f"pass --data PATH_OR_HUB_NAME, or add data.{field} to the recipe",
        )
    return loaded


def check_writable(option: str, file: Path) -> None:
    """Raise DenserlError for a file that an option names and that could not be written."""
    from denserl_cli.core.system.files import is_stream

    if file.is_dir():
        raise DenserlError(f"{option} {file} is a folder", hint="name a file in it")
    folder = next(folder for folder in file.absolute().parents if folder.exists())
    place = file if is_stream(file) else folder
    if not folder.is_dir() or not os.access(place, os.W_OK):
        raise DenserlError(f"{option} {file}: {place} cannot be written", hint="name another file")


def print_plan(stage: str, recipe: Recipe, folder: Path) -> None:
    """Show what a command that trains nothing would read: comments on top of the recipe."""
    from denserl_cli.core.recipe import recipe_to_yaml

    typer.echo(f"# stage: {stage}\n# run folder: {folder}\n{recipe_to_yaml(recipe)}", nl=False)


def _shorthands(stage: str, data: str | None, model: str | None) -> list[Override]:
    from denserl_cli.core.recipe.loader import Override
    from denserl_cli.core.recipe.stages import STAGES

    overrides = []
    if model is not None:
        overrides.append(Override(f"--model {model}", "model.path", model))
    if data is not None:
        option = f"--data {data}"
        overrides.append(Override(option, f"data.{STAGES[stage].data}", [data]))
        overrides += [Override(option, f"data.{field}", []) for field in STAGES[stage].emptied]
    return overrides
