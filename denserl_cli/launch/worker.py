"""The entry of each process that works: a resolved recipe in, a stage run."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, cast

from denserl_cli.core.errors import DenserlError, Interrupted, read_os_error
from denserl_cli.core.observer import Observer
from denserl_cli.core.recipe import Recipe, load_recipe
from denserl_cli.core.recipe.stages import STAGES
from denserl_cli.core.runs.folder import Mode
from denserl_cli.core.stages.run import evaluate, run_stage
from denserl_cli.core.system import distributed
from denserl_cli.core.system.files import write_text
from denserl_cli.core.system.signals import stopped_at_once
from denserl_cli.launch.job_folder import PLACE, lost

LAUNCHER, SIGNAL = "launcher.pid", "signal"
"""Files there: the launcher's process id, and the latest signal that it has handed on."""
_PEER_GONE = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Connection was likely closed",
    "Broken pipe",
    "remote process exited",
)


def main() -> None:
    """Work on a stage as one of several processes that a launcher has started."""
    parser = argparse.ArgumentParser(prog="python -m denserl_cli.launch.worker")
    parser.add_argument("stage")
    parser.add_argument("--local_rank", help="given by the DeepSpeed launcher, not needed")
    for option in ("--recipe", "--run", "--mode"):
        parser.add_argument(option, required=True)
    parser.add_argument("--options", type=json.loads, default={}, help="of an evaluation, as JSON")
    asked = parser.parse_args()
    place = Path(os.environ[PLACE]) if PLACE in os.environ else None
    if place:
        _obey_the_launcher(place)
    with last_words(place):
        recipe, folder = load_recipe(asked.recipe), Path(asked.run)
        work(asked.stage, recipe, folder, cast(Mode, asked.mode), asked.options)


@contextmanager
def last_words(place: Path | None = None) -> Iterator[None]:
    """End this process, one of several, with an error: the first of the job is shown, once.

    place: where the launcher reads what went wrong; None: whoever is first shows it himself.
    """
    try:
        yield
    except BaseException as error:
        code = _report(place, error)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # the others are waiting for this process: no farewell, which would hang


def work(
    stage: str, recipe: Recipe, folder: Path, mode: Mode, options: Mapping[str, Any] | None = None
) -> dict[str, Any] | None:
    """Run a stage together with the other processes, if any; the first one alone speaks.

    options: of an evaluation, whose figures are returned.
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


def _obey_the_launcher(place: Path) -> None:
    """Take signals from the launcher alone, and end when it does."""
    with suppress(PermissionError):  # it has a session of its own already
        os.setsid()  # a Ctrl-C on the terminal reaches the launcher, which hands it on once
    if sys.platform == "linux":
        import ctypes

        end_with_parent = 1  # PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(end_with_parent, signal.SIGKILL)
        if os.getppid() != int((place / LAUNCHER).read_text()):  # it has ended before that
            os._exit(1)
    write_text(place / f"worker-{os.getpid()}.pid", str(os.getpid()))
    if (place / SIGNAL).exists():  # it came before this process could be told
        os.kill(os.getpid(), int((place / SIGNAL).read_text()))


def _report(place: Path | None, error: BaseException) -> int:
    """Leave word of an error for the launcher, or show it; returns the exit code."""
    if isinstance(error, OSError):
        error = read_os_error(error)
    if isinstance(error, KeyboardInterrupt):
        error = stopped_at_once(signal.SIGINT)
    kind = "interrupted" if isinstance(error, Interrupted) else "error"
    if isinstance(error, RuntimeError) and any(words in str(error) for words in _PEER_GONE):
        kind, error = "lost", lost()
    known = error if isinstance(error, DenserlError) else None
    report = {
        "kind": kind,
        "time": time.time(),
        "message": known.message if known else traceback.format_exc().rstrip(),
        "hint": known.hint if known else None,
        "exit_code": known.exit_code if known else 1,
    }
    from denserl_cli.terminal.console import print_error

    if place is not None:
        write_text(place / f"error-{distributed.rank()}.json", json.dumps(report))
    elif distributed.first_to_fail(otherwise=kind != "lost"):
        if known:
            print_error(known)
        else:
            traceback.print_exc()
    return int(cast(int, report["exit_code"]))


if __name__ == "__main__":
    main()
