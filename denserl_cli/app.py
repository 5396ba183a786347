"""The `denserl` command line."""

from __future__ import annotations

import sys
import traceback
from types import ModuleType
from typing import Annotated

import typer

from denserl_cli import __version__
from denserl_cli.commands import (
    answer,
    data,
    demo,
    doctor,
    evaluate,
    export,
    fit_function,
    import_normalizer,
    init,
    plan,
    recipes,
    report,
    score,
    segment,
    slurm,
    status,
    train_ppo,
    train_rm,
    validate,
)
from denserl_cli.commands.help import App
from denserl_cli.core.errors import DenserlError, read_os_error
from denserl_cli.core.system.distributed import first_to_fail
from denserl_cli.core.system.signals import ignore_signals
from denserl_cli.core.system.verbosity import set_verbosity, verbosity

START, TRAIN, LOOK = "Start", "Train", "Look"
MEASURE, MACHINES = "Measure and use", "Machines"

app = App(
    name="denserl",
    help="Dense-reward RLHF: segment reward models, location-aware normalisers, PPO.",
    epilog="Example: denserl train-rm --recipe sandbox-segment",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)


def _add(panel: str, name: str, module: ModuleType) -> None:
    """Register the command of a module, which has the command's name with underscores."""
    function = getattr(module, name.replace("-", "_"))
    app.command(name, epilog=module.EXAMPLE, rich_help_panel=panel)(function)


_add(START, "demo", demo)
_add(START, "init", init)
app.add_typer(recipes.app, name="recipes", rich_help_panel=START)
_add(START, "data", data)
_add(START, "validate", validate)
_add(TRAIN, "train-rm", train_rm)
_add(TRAIN, "fit-function", fit_function)
_add(TRAIN, "import-normalizer", import_normalizer)
_add(TRAIN, "train-ppo", train_ppo)
_add(LOOK, "segment", segment)
_add(LOOK, "status", status)
_add(LOOK, "report", report)
app.add_typer(evaluate.app, name="evaluate", rich_help_panel=MEASURE)
_add(MEASURE, "score", score)
_add(MEASURE, "answer", answer)
_add(MEASURE, "export", export)
_add(MACHINES, "plan", plan)
_add(MACHINES, "slurm", slurm)
_add(MACHINES, "doctor", doctor)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"denserl {__version__}")
        raise typer.Exit


def _be_quiet(wanted: bool) -> None:
    if wanted:
        set_verbosity("quiet")


def _be_verbose(wanted: bool) -> None:
    if wanted:
        set_verbosity("verbose")


VersionOption = Annotated[
    bool,
    typer.Option(
        "--version",
        "-V",
        callback=_print_version,
        is_eager=True,
        expose_value=False,
        help="Show the version and exit.",
    ),
]
QuietOption = Annotated[
    bool,
    typer.Option(
        "--quiet",
        "-q",
        callback=_be_quiet,
        expose_value=False,
        help="No progress: results, notes and errors alone.",
    ),
]
VerboseOption = Annotated[
    bool,
    typer.Option(
        "--verbose",
        "-v",
        callback=_be_verbose,
        expose_value=False,
        help="The libraries' messages too, and tracebacks.",
    ),
]


@app.callback()
def _options(
    version: VersionOption = False, quiet: QuietOption = False, verbose: VerboseOption = False
) -> None:
    """Dense-reward RLHF: segment reward models, location-aware normalisers, PPO."""


def main() -> None:
    """Run the command line; an error that the user can mend becomes a message and exit code."""
    try:
        app(prog_name="denserl")
    except SystemExit as ended:
        if not ended.code:
            ignore_signals()  # all is done: nothing is to be lost by one that comes now
        raise
    except (DenserlError, OSError) as error:
        from denserl_cli.terminal.console import print_error

        if verbosity() == "verbose":
            traceback.print_exc()
        if isinstance(error, OSError):
            error = read_os_error(error)
        if not error.is_told and first_to_fail():
            print_error(error)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
