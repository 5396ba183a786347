"""The entry of each process that works: a resolved recipe in, a stage run."""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

from denserl_cli.core.errors import DenserlError
from denserl_cli.core.observer import Observer
from denserl_cli.core.recipe import Recipe, load_recipe
from denserl_cli.core.recipe.stages import STAGES
from denserl_cli.core.runs.folder import Mode
from denserl_cli.core.stages.run import evaluate, run_stage
from denserl_cli.core.system import distributed
from denserl_cli.core.system.signals import ignore_signals
from denserl_cli.launch.job_folder import JobFolder, Report


def main() -> None:
    """Work on a stage as one of several processes that a launcher has started."""
    parser = argparse.ArgumentParser(prog="python -m denserl_cli.launch.worker")
    parser.add_argument("stage")
    for option in ("--recipe", "--run", "--mode"):
        parser.add_argument(option, required=True)
    parser.add_argument("--options", type=json.loads, default={}, help="of an evaluation, as JSON")
    asked = parser.parse_args()
    job = JobFolder.of_this_worker()
    with ended_by_errors(job):
        if job:
            job.enter()
        recipe, folder = load_recipe(asked.recipe), Path(asked.run)
        work(asked.stage, recipe, folder, cast(Mode, asked.mode), asked.options)
    ignore_signals()


@contextmanager
def ended_by_errors(job: JobFolder | None = None) -> Iterator[None]:
    """End this process, one of several, with an error: the first of the job is shown, once.

    job: where the launcher reads what went wrong; None: whoever fails first shows it.
    """
    try:
        yield
    except BaseException as error:
        code = _tell(job, error)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # the others are waiting for this process: an orderly exit would hang


def work(
    stage: str, recipe: Recipe, folder: Path, mode: Mode, options: Mapping[str, Any] | None = None
) -> dict[str, Any] | None:
    """Run a stage together with the other processes, if any; the first one alone speaks.

    options: of an evaluation, whose metrics are returned.
    """
    from denserl_cli.terminal.dashboard import make_observer

    distributed.join()
    result = None
    with make_observer() if distributed.is_main_process() else nullcontext(Observer()) as observer:
        if STAGES[stage].subject:
            result = evaluate(stage, recipe, folder, observer, options or {})
        else:
            run_stage(stage, recipe, folder, mode, observer)
    distributed.leave()
    return result


def _tell(job: JobFolder | None, error: BaseException) -> int:
    """Tell the launcher, or the terminal, of an error; returns the exit code."""
    report = Report.of(error)
    is_first = distributed.first_to_fail(otherwise=report.kind != "lost")
    if job is not None:
        job.write_report(distributed.rank(), report)
    elif is_first:
        from denserl_cli.terminal.console import print_error

        if report.kind != "error" or isinstance(error, DenserlError | OSError):
            print_error(report.error())
        else:
            traceback.print_exc()
    return report.exit_code


if __name__ == "__main__":
    main()
