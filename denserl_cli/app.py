"""The `denserl` command line."""

from __future__ import annotations

import sys
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
from denserl_cli.core.errors import DenserlError, read_os_error
from denserl_cli.core.system.distributed import first_to_fail
from denserl_cli.core.system.signals import ignore_signals

app = typer.Typer(
    name="denserl",
    help="Dense-reward RLHF: segment reward models, location-aware normalisers, PPO.",
    epilog="Example: denserl train-rm --recipe sandbox-segment",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: rich's would double its time
)

app.command("train-rm", epilog=train_rm.EXAMPLE)(train_rm.train_rm)
app.command("fit-function", epilog=fit_function.EXAMPLE)(fit_function.fit_function)
app.command("import-normalizer", epilog=import_normalizer.EXAMPLE)(
    import_normalizer.import_normalizer
)
app.command("train-ppo", epilog=train_ppo.EXAMPLE)(train_ppo.train_ppo)
app.command("segment", epilog=segment.EXAMPLE)(segment.segment)
app.command("answer", epilog=answer.EXAMPLE)(answer.answer)
app.command("score", epilog=score.EXAMPLE)(score.score)
app.command("export", epilog=export.EXAMPLE)(export.export)
app.command("data", epilog=data.EXAMPLE)(data.data)
app.command("demo", epilog=demo.EXAMPLE)(demo.demo)
app.command("report", epilog=report.EXAMPLE)(report.report)
app.command("doctor", epilog=doctor.EXAMPLE)(doctor.doctor)
app.command("plan", epilog=plan.EXAMPLE)(plan.plan)
app.command("slurm", epilog=slurm.EXAMPLE)(slurm.slurm)
app.command("status", epilog=status.EXAMPLE)(status.status)
app.command("validate", epilog=validate.EXAMPLE)(validate.validate)
app.add_typer(evaluate.app, name="evaluate")
app.add_typer(recipes.app, name="recipes")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"denserl {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version."),
    ] = False,
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

        if isinstance(error, OSError):
            error = read_os_error(error)
        if not error.is_told and first_to_fail():
            print_error(error)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
