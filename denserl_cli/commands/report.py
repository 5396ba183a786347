"""`denserl report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from denserl_cli.commands.common import check_writable
from denserl_cli.commands.completion import complete_run
from denserl_cli.core.errors import DenserlError

EXAMPLE = "Example: denserl report runs/sandbox-segment"


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN",
            help="Run folders; several are compared.",
            autocompletion=complete_run,
        ),
    ],
    html: Annotated[
        Path | None,
        typer.Option(
            "--html",
            metavar="FILE",
            help="Where the page goes; RUN/report.html without it, or comparison.html.",
        ),
    ] = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Write Markdown beside the page, with its plots.")
    ] = False,
) -> None:
    """Write a page that shows whether a run was good, or how several runs differ."""
    from denserl_cli.core.reporting.record import read_runs
    from denserl_cli.core.reporting.report import make_report
    from denserl_cli.pages.report import write_markdown, write_page

    read = read_runs(runs)
    page = html or (runs[0] / "report.html" if len(runs) == 1 else Path("comparison.html"))
    check_writable("--html", page)
    beside = page.with_suffix(".md")
    if markdown:
        if beside == page:
            hint = "name a page that ends in .html"
            raise DenserlError(f"--html {page} is where --markdown writes", hint=hint)
        check_writable("--markdown", beside)
    made = make_report(read)
    write_page(made, page)
    for run in made.runs:
        for finding in run.findings:
            typer.echo(f"{run.label}: {finding.severity}: {finding.what}")
        if not run.findings:
            typer.echo(f"{run.label}: no warnings from the metrics")
    typer.echo(f"written to {page}")
    if markdown:
        write_markdown(made, beside)
        typer.echo(f"written to {beside}")
