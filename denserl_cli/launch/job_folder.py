"""The files by which a launcher and its workers talk to each other."""

from __future__ import annotations

import json
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from denserl_cli.core.errors import DenserlError
from denserl_cli.core.system.signals import stopped_at_once

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure


PLACE = "DENSERL_JOB"
"""Environment variable: the folder in which the processes of this machine leave word."""


def lost() -> DenserlError:
    """What a process has to say that fails because another one has gone."""
    error = DenserlError(
        "the connection to another process of the job is lost: it failed or was killed",
        hint="--resume goes on from the last checkpoint",
    )
    error.exit_code = 1
    return error


_LINES = 20
"""How much of a process's own words is shown when it ended without leaving a report."""


def first_error(
    place: Path, failures: Mapping[int, ProcessFailure], asked: int | None = None
) -> DenserlError:
    """The first error that a process of this machine left, or how the first one ended.

    failures: by rank. asked: the signal that asked the launcher to stop; without it, a process that
    has been stopped was stopped because another one had failed, or on another machine.
    """
    files = {int(file.stem.split("-")[1]): file for file in place.glob("error-*.json")}
    left = [json.loads(file.read_text("utf-8")) for file in files.values()]
    reports = sorted(left, key=lambda report: float(report["time"]))
    own = ("error",) if asked is None else ("error", "interrupted")
    errors = [report for report in reports if report["kind"] in own]
    # the launcher itself ends the others by SIGTERM
    silent = [
        _unexplained(rank, failure, place)
        for rank, failure in failures.items()
        if rank not in files and failure.exitcode != -signal.SIGTERM
    ]
    if not errors and asked is not None:
        return stopped_at_once(asked)
    if not errors and silent:
        return silent[0]
    for report in errors or reports:
        error = DenserlError(report["message"], hint=report["hint"])
        error.exit_code = report["exit_code"]
        return error
    return lost()


def _unexplained(rank: int, failure: ProcessFailure, place: Path) -> DenserlError:
    """What is known of a process that ended without a word."""
    if failure.exitcode < 0:
        error = DenserlError(
            f"process {rank} was killed by {failure.signal_name()}",
            hint="out of memory is the usual reason; --resume goes on from the last checkpoint",
        )
        error.exit_code = 1
        return error
    logs = place.glob(f"logs/*/attempt_0/{failure.local_rank}/stderr.log")
    lines = [line for log in logs for line in log.read_text("utf-8", "replace").splitlines()]
    ended = f"process {rank} ended with code {failure.exitcode}"
    error = DenserlError("\n".join([ended, *lines[-_LINES:]]))
    error.exit_code = 1
    return error
