"""`denserl score`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, BinaryIO

import typer

from denserl_cli.commands.common import DryRunOption, OutOption, RecipeOption, SetOption, print_plan
from denserl_cli.core.errors import DenserlError

EXAMPLE = "Example: denserl score --recipe sandbox-segment --data in.jsonl --to out.jsonl"


def score(
    recipe: RecipeOption,
    data: Annotated[
        str,
        typer.Option(
            "--data",
            metavar="FILE",
            help="JSON Lines with messages, prompt + response, or chosen + rejected; - for stdin.",
        ),
    ],
    to: Annotated[
        str, typer.Option("--to", metavar="FILE", help="JSON Lines to write; - for stdout.")
    ],
    overrides: SetOption = None,
    out: OutOption = None,
    prefix: Annotated[
        str, typer.Option("--prefix", help="Begin the names of the added fields with this.")
    ] = "",
    fresh: Annotated[bool, typer.Option("--fresh", help="Replace the file of --to.")] = False,
    dry_run: DryRunOption = False,
) -> None:
    """Score responses with a run's reward model, as a whole and segment by segment."""
    from denserl_cli.core.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    folder = out or Path("runs") / loaded.name
    if dry_run:
        print_plan("score", loaded, folder)
        return
    _check_target(to, fresh)
    with _opened(data) as lines:
        from denserl_cli.core.evaluation.responses import score_lines
        from denserl_cli.core.inspection.inspector import Inspector
        from denserl_cli.core.runs.folder import RunFolder
        from denserl_cli.core.stages.run import quiet_libraries
        from denserl_cli.terminal.dashboard import make_observer

        quiet_libraries()
        with make_observer() as observer:
            inspector = Inspector(loaded, RunFolder(folder, loaded), observer, scoring=True)
            with _target(to) as target:
                name = "stdin" if data == "-" else data
                score_lines(inspector, name, lines, target, observer, prefix=prefix)


def _check_target(to: str, fresh: bool) -> None:
    if to != "-" and Path(to).is_dir():
        raise DenserlError(f"--to {to} is a folder", hint="name a file in it")
    if to != "-" and Path(to).exists() and not fresh:
        raise DenserlError(f"--to {to} exists already", hint="name another file, or pass --fresh")


@contextmanager
def _opened(data: str) -> Iterator[BinaryIO]:
    if data == "-":
        yield sys.stdin.buffer
        return
    try:
        file = Path(data).open("rb")
    except OSError as error:
        hint = "name a file of JSON Lines"
        raise DenserlError(f"--data {data}: {error.strerror}", hint=hint) from error
    with file:
        yield file


@contextmanager
def _target(to: str) -> Iterator[BinaryIO]:
    from denserl_cli.core.system.files import replaced_file

    if to == "-":
        yield sys.stdout.buffer
        return
    with replaced_file(Path(to)) as file:
        yield file
