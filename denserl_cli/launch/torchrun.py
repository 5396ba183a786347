"""Several processes for one stage: torchrun's own launcher, started for the user.

The processes run `denserl_cli.launch.worker`. What goes wrong in one of them comes back through the
job's folder, so that the first error is the one that is shown.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread
from types import FrameType
from typing import Any

from denserl_cli.core.errors import DenserlError, Interrupted
from denserl_cli.core.recipe import Recipe
from denserl_cli.core.runs.checkpoints import newest_step
from denserl_cli.core.system.signals import (
    STOP_SIGNALS,
    set_exit_code,
    stopped_at_once,
    stopped_before_work,
)
from denserl_cli.launch.job_folder import VARIABLE, JobFolder
from denserl_cli.launch.processes import WORKER, Processes

_PATIENCE = 900
"""Seconds that a machine waits for the others."""
_TWICE = 5
"""Seconds within which a signal that comes again is the same one."""


def run_processes(
    processes: Processes,
    stage: str,
    recipe: Recipe,
    folder: Path,
    mode: str,
    options: Mapping[str, object] | None = None,
) -> None:
    """Run a stage in several processes; returns when all have finished.

    Args:
        processes: how many, and on which machines.
        stage: of training, or an evaluation.
        recipe: what the stage reads.
        folder: the run folder.
        mode: what to do with what an earlier run left there.
        options: of an evaluation.

    Raises:
        DenserlError: the first error of any process, after all of them have ended.
        Interrupted: a signal has ended the job.
    """
    before = 0 if mode == "fresh" else newest_step(folder, stage) or 0
    with TemporaryDirectory(prefix="denserl-") as name:
        job = JobFolder.make(Path(name), recipe)
        words = worker_words(stage, job.recipe, folder, mode)
        words += ["--options", json.dumps(options)] if options else []
        os.environ[VARIABLE] = name
        os.environ.setdefault("OMP_NUM_THREADS", _threads(processes.count))
        try:
            with _signals_handed_on(job) as asked:
                _launch(processes, words, job, asked)
        except Interrupted as error:
            if error.signal is not None:  # told by the launcher; the workers know their own code
                begun = (newest_step(folder, stage) or 0) > before
                set_exit_code(error, begun)
            # the nodes of a Slurm job write into one log
            error.is_told = bool(processes.node_rank) and "SLURM_STEP_ID" in os.environ
            raise


def worker_words(stage: str, file: Path, folder: Path, mode: str) -> list[str]:
    """What follows `-m denserl_cli.launch.worker`."""
    return [stage, "--recipe", str(file), "--run", str(folder.absolute()), "--mode", mode]


def _launch(
    processes: Processes, words: list[str], job: JobFolder, asked: Callable[[], int | None]
) -> None:
    """Start torchrun's agent and wait for it, open to signals whatever torch waits for."""
    failed: list[BaseException] = []

    def run_agent() -> None:
        try:
            _run_agent(processes, words, job)
        except BaseException as error:  # it is raised below
            failed.append(error)

    # beside the main thread, which alone can take signals and must not be stuck in torch's sockets
    agent = Thread(target=run_agent, daemon=True)
    started = time.monotonic()
    agent.start()
    while agent.is_alive():
        agent.join(0.1)
        number = asked()
        if number is not None and agent.is_alive() and not _has_workers():
            several = processes.nodes > 1
            error = stopped_before_work(number) if several else stopped_at_once(number)
            atexit.register(_exit, error.exit_code)
            raise error
    if failed:
        raise _explained(failed[0], job, asked(), time.monotonic() - started)


def _exit(code: int) -> None:
    """End this process without taking Python down under a thread that is in torch's sockets."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _explained(
    error: BaseException, job: JobFolder, asked: int | None, seconds: float
) -> BaseException:
    """What to say of an exception of torchrun's agent."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError

    if isinstance(error, ChildFailedError):
        return job.first_error(error.failures, asked)
    if isinstance(error, RuntimeError | OSError | RendezvousError):
        return DenserlError(
            f"the processes did not meet within {seconds:.0f} s: {error}",
            hint="check --nodes, --node-rank and --rendezvous on every machine",
        )
    return error


def _has_workers() -> bool:
    """Whether this process has started any."""
    import psutil

    return bool(psutil.Process().children())


def _run_agent(processes: Processes, words: list[str], job: JobFolder) -> None:
    """Meet the launchers of the other machines, if any, and run the workers of this one."""
    with _quiet_sockets():
        from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=processes.nodes,
        max_nodes=processes.nodes,
        nproc_per_node=processes.count,
        run_id="denserl",
        **_meeting(processes),
        max_restarts=0,
        shutdown_timeout=10,  # seconds from the first failure until the others are killed
        logs_specs=DefaultLogsSpecs(
            log_dir=str(job.path / "logs"),
            redirects={rank: Std.ALL for rank in range(1, processes.count)},
        ),
    )
    elastic_launch(config, sys.executable)("-m", WORKER, *words)


def _meeting(processes: Processes) -> dict[str, Any]:
    """Where and how the launchers of the machines meet."""
    if processes.nodes == 1:
        return {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0"}
    place = processes.rendezvous or ""
    common = {"rdzv_endpoint": place, "local_addr": _own_address(place)}
    if processes.node_rank is not None:
        settings = {"rank": processes.node_rank, "timeout": _PATIENCE}
        return {**common, "rdzv_backend": "static", "rdzv_configs": settings}
    # torch compares names, which tells nothing where a machine has several
    here = _can_listen(place)
    settings = {"is_host": here, "read_timeout": 60 if here else _PATIENCE}
    return {**common, "rdzv_backend": "c10d", "rdzv_configs": settings}


@contextmanager
def _quiet_sockets() -> Iterator[None]:
    """Import torch without its C++ library's words about every address that it tries."""
    before = os.environ.get("TORCH_CPP_LOG_LEVEL")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    try:
        yield
    finally:
        if before is None:  # the workers may speak
            del os.environ["TORCH_CPP_LOG_LEVEL"]


def _can_listen(rendezvous: str) -> bool:
    """Whether HOST:PORT is an address of this machine on which nobody listens yet."""
    host, _, port = rendezvous.rpartition(":")
    with socket.socket() as attempt:
        attempt.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            attempt.bind((host, int(port)))
        except OSError:
            return False
    return True


def _own_address(rendezvous: str) -> str:
    """The address of this machine on the network that leads to HOST:PORT; nothing is sent.

    torch would give the other machines its name, which they may not know.
    """
    host, _, port = rendezvous.rpartition(":")
    with socket.socket(type=socket.SOCK_DGRAM) as towards:
        try:
            towards.connect((host, int(port)))
        except OSError as error:
            raise DenserlError(
                f"--rendezvous {rendezvous}: {error.strerror or error}",
                hint="name HOST:PORT of the first machine, as this one can reach it",
            ) from error
        return str(towards.getsockname()[0])


@contextmanager
def _signals_handed_on(job: JobFolder) -> Iterator[Callable[[], int | None]]:
    """Hand Ctrl-C and the scheduler's signals on to the workers; a repeated one kills them.

    A second Ctrl-C does so, and any signal that comes a while after the first: a scheduler may send
    its own twice at once. Yields a function that returns the first signal, if any.
    """
    asked: list[int] = []
    first = 0.0

    def hand_on(number: int, _: FrameType | None) -> None:
        nonlocal first
        now = time.monotonic()
        first = first if asked else now
        kills = bool(asked) and (number == signal.SIGINT or now - first > _TWICE)
        asked.append(number)
        job.send(signal.SIGKILL if kills else number)

    before = {number: signal.signal(number, hand_on) for number in STOP_SIGNALS}
    if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # the terminal is closed
        before[signal.SIGHUP] = signal.signal(
            signal.SIGHUP, lambda *_: hand_on(signal.SIGTERM, None)
        )
    try:
        yield lambda: asked[0] if asked else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _threads(processes: int) -> str:
    """Threads of each process, so that together they fill the machine once."""
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    return str(max(1, cores // processes))
