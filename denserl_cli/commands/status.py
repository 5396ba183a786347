"""`denserl status`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from denserl_cli.commands.common import JsonOption
from denserl_cli.commands.completion import complete_run

if TYPE_CHECKING:
    from denserl_cli.core.runs.status import RunStatus, StageStatus

EXAMPLE = "Example: denserl status runs/sandbox-segment"

_SHOWN = ("loss", "accuracy", "eval_accuracy", "true_reward", "rm_score", "dense_reward", "kl")
"""Metrics that the table has room for; --json has them all."""


def status(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN", help="Run folders.", autocompletion=complete_run),
    ],
    as_json: JsonOption = False,
) -> None:
    """How far runs are, and whether a job works on them; their files tell it, nothing is asked."""
    from denserl_cli.core.runs.status import read_status

    found = [read_status(run) for run in runs]
    if as_json:
        typer.echo(json.dumps([_document(one) for one in found], indent=2, ensure_ascii=False))
        return
    from denserl_cli.terminal.console import print_table

    for one in found:
        job = "no job works on it"
        if one.job:
            job = f"process {one.job.pid} on {one.job.host} works on it since {one.job.since}"
        columns = ["stage", "state", "step", "left", "last metrics", "checkpoints", "exit code"]
        rows = [[name, *_cells(stage)] for name, stage in one.stages.items()]
        typer.echo(f"{one.run}, recipe {one.recipe}: {job}")
        print_table("", columns, rows)


def _document(one: RunStatus) -> dict[str, object]:
    return {**asdict(one), "job": one.job._asdict() if one.job else None}


def _cells(stage: StageStatus) -> list[object]:
    step = None if stage.step is None else str(stage.step)
    if step is not None and stage.steps is not None:
        step += f" of {stage.steps}"
    shown = [f"{name} {stage.metrics[name]:.4g}" for name in _SHOWN if name in stage.metrics]
    code = None if stage.exit_code is None else str(stage.exit_code)
    kept = ", ".join(map(str, stage.checkpoints)) or None
    return [stage.state, step, _duration(stage.seconds_left), ", ".join(shown) or None, kept, code]


def _duration(seconds: float | None) -> str | None:
    """A time as H:MM:SS."""
    if seconds is None:
        return None
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
