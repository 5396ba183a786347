"""`denserl import-normalizer`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from denserl_cli.commands.common import OutOption, RecipeOption, SetOption

EXAMPLE = "Example: denserl import-normalizer --recipe phi3-segment coefficients.json"


def import_normalizer(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The authors' coefficient JSON.")],
    recipe: RecipeOption,
    overrides: SetOption = None,
    out: OutOption = None,
    key: Annotated[
        list[str] | None,
        typer.Option("--key", metavar="KEY", help="Part of the entry's path; may be repeated."),
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Replace the normaliser that the run has.")
    ] = False,
) -> None:
    """Take the normaliser of a run's reward model from the authors' coefficient file."""
    from denserl_cli.core.errors import DenserlError
    from denserl_cli.core.recipe import load_recipe
    from denserl_cli.core.runs.folder import RunFolder
    from denserl_cli.core.stages.import_normalizer import import_normalizer as write
    from denserl_cli.core.stages.run import quiet_libraries
    from denserl_cli.terminal.dashboard import make_observer

    loaded = load_recipe(recipe, overrides or ())
    run = RunFolder(out or Path("runs") / loaded.name, loaded)
    quiet_libraries()
    with make_observer() as observer:
        try:
            with run.locked(observer):
                write(loaded, run, file, key or (), "fresh" if fresh else "start", observer)
        except DenserlError:
            run.abandon()
            raise
