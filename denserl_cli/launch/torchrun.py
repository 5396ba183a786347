"""Several processes for one stage: torchrun's own launcher, started for the user.

The processes run `denserl_cli.launch.worker`. What goes wrong in one of them comes back through a
file, so that the first error is the one that is shown.
"""

from __future__ import annotations

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
from types import FrameType
from typing import TYPE_CHECKING

from denserl_cli.core.errors import DenserlError
from denserl_cli.core.recipe import Recipe, recipe_to_yaml
from denserl_cli.core.system.files import write_text
from denserl_cli.launch.hostfile import check_launcher, launcher_command
from denserl_cli.launch.job_folder import PLACE, first_error
from denserl_cli.launch.processes import WORKER, Processes, visible_gpus
from denserl_cli.launch.worker import LAUNCHER, SIGNAL

if TYPE_CHECKING:
    pass

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
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

    options: of an evaluation. Raises DenserlError with the first error of any process, after all of
    them have ended.
    """
    with TemporaryDirectory(prefix="denserl-") as name:
        place = Path(name)
        file = place / "recipe.yaml"
        file.write_text(recipe_to_yaml(recipe), encoding="utf-8")
        (place / LAUNCHER).write_text(str(os.getpid()))
        words = worker_words(stage, file, folder, mode)
        words += ["--options", json.dumps(options)] if options else []
        os.environ[PLACE] = str(place)
        os.environ.setdefault("OMP_NUM_THREADS", _threads(processes.count))
        with _signals_to_workers(place) as asked:
            _launch(processes, words, place, asked)


def run_hosts(file: Path, stage: str, recipe: Recipe, folder: Path, mode: str) -> None:
    """Become DeepSpeed's launcher, which runs a stage on the machines of a hostfile.

    Its signals and exit code are its own. Raises DenserlError when something that it needs is
    missing.
    """
    check_launcher(file)
    write_text(resolved(stage, folder), recipe_to_yaml(recipe))
    if not visible_gpus():
        os.environ["DS_ACCELERATOR"] = "cpu"
    command = hosts_command(file, stage, folder, mode)
    os.execv(command[0], command)


def hosts_command(file: Path, stage: str, folder: Path, mode: str) -> list[str]:
    """The command that `run_hosts` becomes."""
    words = worker_words(stage, resolved(stage, folder), folder, mode)
    return launcher_command(file, [WORKER, *words])


def resolved(stage: str, folder: Path) -> Path:
    """The recipe for the processes of all machines, beside the run folder, which they share."""
    return folder.absolute().with_name(f".{folder.name}.{stage}.yaml")


def worker_words(stage: str, file: Path, folder: Path, mode: str) -> list[str]:
    """What follows `-m denserl_cli.launch.worker`."""
    return [stage, "--recipe", str(file), "--run", str(folder.absolute()), "--mode", mode]


def _launch(
    processes: Processes, words: list[str], place: Path, asked: Callable[[], int | None]
) -> None:
    with _quiet_sockets():
        from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    static = processes.nodes > 1 and processes.node_rank is not None
    settings: dict[str, object] = {}
    if static:
        settings = {"rank": processes.node_rank, "timeout": _PATIENCE}
    elif processes.nodes > 1:
        # torch compares names, which tells nothing where a machine has several
        here = _can_listen(processes.rendezvous or "")
        settings = {"is_host": here, "read_timeout": 60 if here else _PATIENCE}
    config = LaunchConfig(
        min_nodes=processes.nodes,
        max_nodes=processes.nodes,
        nproc_per_node=processes.count,
        run_id="denserl",
        rdzv_backend="static" if static else "c10d",
        rdzv_endpoint=(processes.rendezvous or "") if processes.nodes > 1 else "localhost:0",
        rdzv_configs=settings,
        local_addr=_own_address(processes.rendezvous or "") if processes.nodes > 1 else None,
        max_restarts=0,
        shutdown_timeout=10,  # seconds from the first failure until the others are killed
        signals_to_handle="SIGHUP",  # the others ask the processes for a checkpoint, see below
        logs_specs=DefaultLogsSpecs(
            log_dir=str(place / "logs"),
            redirects={rank: Std.ALL for rank in range(1, processes.count)},
        ),
    )
    started = time.monotonic()
    try:
        elastic_launch(config, sys.executable)("-m", WORKER, *words)
    except ChildFailedError as error:
        raise first_error(place, error.failures, asked()) from error
    except (RuntimeError, OSError, RendezvousError) as error:
        seconds = time.monotonic() - started
        raise DenserlError(
            f"the processes did not meet within {seconds:.0f} s: {error}",
            hint="check --nodes, --node-rank and --rendezvous on every machine",
        ) from error


@contextmanager
def _quiet_sockets() -> Iterator[None]:
    """Import torch without its C++ library's words about every address that it tries."""
    before = os.environ.get("TORCH_CPP_LOG_LEVEL")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    try:
        yield
    finally:
        if before is None:  # the processes may speak
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
def _signals_to_workers(place: Path) -> Iterator[Callable[[], int | None]]:
    """Hand Ctrl-C and the scheduler's signals on to the processes; insisting kills them.

    A second Ctrl-C insists, and so does any signal that comes a while after the first: a scheduler
    may send its own twice at once. Yields a function that returns the first signal, if any.
    """
    asked: list[int] = []
    first = 0.0

    def hand_on(number: int, _: FrameType | None) -> None:
        nonlocal first
        now = time.monotonic()
        first = first if asked else now
        insists = asked and (number == signal.SIGINT or now - first > _TWICE)
        how = signal.SIGKILL if insists else number
        asked.append(number)
        write_text(place / SIGNAL, str(how))  # for those that are just starting
        for file in place.glob("worker-*.pid"):
            try:
                os.kill(int(file.read_text()), how)
            except (ProcessLookupError, ValueError):
                continue  # it has ended

    before = {number: signal.signal(number, hand_on) for number in _STOP_SIGNALS}
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
