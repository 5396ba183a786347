"""The folder by which a launcher and its workers talk to each other: every file and who writes it.

recipe.yaml         the launcher: the resolved recipe that all of them run
launcher.pid        the launcher: its process id, by which workers see that it is still there
signal              the launcher: the latest signal that it has handed on
worker-PID.pid      each worker: where it takes signals
error-RANK.json     each worker that fails: why
logs/               torchrun: the output of every worker but the first
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from denserl_cli.core.errors import DenserlError, Interrupted, read_os_error
from denserl_cli.core.recipe import Recipe, recipe_to_yaml
from denserl_cli.core.system.distributed import PeerLostError
from denserl_cli.core.system.files import write_text
from denserl_cli.core.system.signals import Stopped, stopped_at_once

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

VARIABLE = "DENSERL_JOB"
"""Environment variable: the folder of the job, for its workers."""
_LAUNCHER, _SIGNAL = "launcher.pid", "signal"
_LINES = 20
"""How much of a worker's own output is shown when it ended without leaving a report."""
_PEER_GONE = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Connection was likely closed",
    "Broken pipe",
    "remote process exited",
)
"""What torch's messages say when the process at the other end has gone."""


@dataclass(frozen=True)
class Report:
    """Why a worker, or the launcher of another machine, failed.

    kind: `lost` is the consequence of another one's failure. time: in seconds since the epoch.
    """

    kind: Literal["error", "interrupted", "lost"]
    time: float
    message: str
    hint: str | None
    exit_code: int

    @classmethod
    def of(cls, error: BaseException) -> Report:
        """Read an exception that is being handled."""
        if isinstance(error, OSError):
            error = read_os_error(error)
        if isinstance(error, KeyboardInterrupt):
            number = error.number if isinstance(error, Stopped) else signal.SIGINT
            error = stopped_at_once(number)
        if isinstance(error, RuntimeError) and any(words in str(error) for words in _PEER_GONE):
            error = PeerLostError()
        if not isinstance(error, DenserlError):
            return cls("error", time.time(), traceback.format_exc().rstrip(), None, 1)
        kind: Literal["error", "interrupted", "lost"] = "error"
        if isinstance(error, Interrupted):
            kind = "interrupted"
        elif isinstance(error, PeerLostError):
            kind = "lost"
        return cls(kind, time.time(), error.message, error.hint, error.exit_code)

    def error(self) -> DenserlError:
        """The error to show for it."""
        made = {"interrupted": Interrupted, "lost": DenserlError, "error": DenserlError}
        error = made[self.kind](self.message, hint=self.hint)
        error.exit_code = self.exit_code
        return error


class JobFolder:
    """The folder of one job on this machine, or of one on several that share a file system."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe = path / "recipe.yaml"

    @classmethod
    def make(cls, path: Path, recipe: Recipe) -> JobFolder:
        """Begin a job of which this process is the launcher."""
        job = cls(path)
        path.mkdir(parents=True, exist_ok=True)
        write_text(job.recipe, recipe_to_yaml(recipe))
        write_text(path / _LAUNCHER, str(os.getpid()))
        return job

    @classmethod
    def of_this_worker(cls) -> JobFolder | None:
        """The folder that the launcher has named; None where another launcher started this."""
        named = os.environ.get(VARIABLE)
        return cls(Path(named)) if named else None

    def send(self, number: int) -> None:
        """Send a signal to all workers, also to those that are just starting."""
        write_text(self.path / _SIGNAL, str(number))
        for file in self.path.glob("worker-*.pid"):
            with suppress(ProcessLookupError, ValueError):  # it has ended
                os.kill(int(file.read_text()), number)

    def enter(self) -> None:
        """Make this process a worker: it takes signals from the launcher alone and ends with it."""
        with suppress(PermissionError):  # it has a session of its own already
            os.setsid()  # a Ctrl-C on the terminal reaches the launcher, which hands it on once
        if sys.platform == "linux":
            import ctypes

            end_with_parent = 1  # PR_SET_PDEATHSIG
            ctypes.CDLL(None).prctl(end_with_parent, signal.SIGKILL)
            if os.getppid() != self._launcher():  # it has ended before that
                os._exit(1)
        write_text(self.path / f"worker-{os.getpid()}.pid", str(os.getpid()))
        if (self.path / _SIGNAL).exists():  # it came before this process could be told
            os.kill(os.getpid(), int((self.path / _SIGNAL).read_text()))

    def _launcher(self) -> int | None:
        with suppress(FileNotFoundError):  # the launcher has ended and removed the folder
            return int((self.path / _LAUNCHER).read_text())
        return None

    def write_report(self, rank: int, report: Report) -> None:
        """Tell the launcher why this process fails. rank: of the process, or of its machine."""
        with suppress(FileNotFoundError):  # the launcher has ended
            write_text(self.path / f"error-{rank}.json", json.dumps(asdict(report)))

    def reports(self) -> dict[int, Report]:
        """What those that failed have left, by rank, in the order in which they failed."""
        found = {
            int(file.stem.split("-")[1]): Report(**json.loads(file.read_text("utf-8")))
            for file in self.path.glob("error-*.json")
        }
        return dict(sorted(found.items(), key=lambda item: item[1].time))

    def first_error(
        self, failures: Mapping[int, ProcessFailure], asked: int | None = None
    ) -> DenserlError:
        """The first error that a worker left, or how the first one ended.

        Args:
            failures: the workers of this machine that failed, by rank.
            asked: the signal that asked the launcher to stop; without it, a worker that has been
                stopped was stopped because another one had failed, or on another machine.
        """
        reports = self.reports()
        own = ("error",) if asked is None else ("error", "interrupted")
        errors = [report for report in reports.values() if report.kind in own]
        # the launcher itself ends the others by SIGTERM
        silent = [
            self._unexplained(rank, failure)
            for rank, failure in failures.items()
            if rank not in reports and failure.exitcode != -signal.SIGTERM
        ]
        if errors:
            return errors[0].error()
        if asked is not None:
            return stopped_at_once(asked)
        if silent:
            return silent[0]
        interrupted = [one for one in reports.values() if one.kind == "interrupted"]
        return next((one.error() for one in (*interrupted, *reports.values())), PeerLostError())

    def _unexplained(self, rank: int, failure: ProcessFailure) -> DenserlError:
        """What is known of a worker that ended without a report."""
        if failure.exitcode < 0:
            error = DenserlError(
                f"process {rank} was killed by {failure.signal_name()}",
                hint="out of memory is the usual reason; --resume goes on from the last checkpoint",
            )
        else:
            logs = self.path.glob(f"logs/*/attempt_0/{failure.local_rank}/stderr.log")
            lines = [
                line for log in logs for line in log.read_text("utf-8", "replace").splitlines()
            ]
            ended = f"process {rank} ended with code {failure.exitcode}"
            error = DenserlError("\n".join([ended, *lines[-_LINES:]]))
        error.exit_code = 1
        return error
