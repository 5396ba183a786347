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
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import TYPE_CHECKING

from denserl_cli.core.errors import DenserlError
from denserl_cli.core.recipe import Recipe, recipe_to_yaml
from denserl_cli.core.system.distributed import world_size
from denserl_cli.core.system.files import write_text
from denserl_cli.core.system.signals import stopped_at_once
from denserl_cli.launch.hostfile import check_launcher, launcher_command, read_hosts
from denserl_cli.launch.worker import LAUNCHER, PLACE, SIGNAL, lost

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
WORKER = "denserl_cli.launch.worker"
"""The module that each process runs."""
_PATIENCE = 900
"""Seconds that a machine waits for the others."""
_TWICE = 5
"""Seconds within which a signal that comes again is the same one."""
_LINES = 20
"""How much of a process's own words is shown when it ended without leaving a report."""


@dataclass(frozen=True)
class Processes:
    """How many processes work on a stage, and on which machines.

    count: on each machine. rendezvous: host:port of the first machine, needed for several.
    node_rank: number of this machine; None lets the rendezvous number them. started: by another
    launcher, and this is one of them; count is then that of all machines. hostfile: DeepSpeed's
    launcher starts them on the machines that it names; count is that of all machines, too.
    """

    count: int = 1
    nodes: int = 1
    node_rank: int | None = None
    rendezvous: str | None = None
    started: bool = False
    hostfile: Path | None = None

    @property
    def world_size(self) -> int:
        """Processes on all machines."""
        return self.count * self.nodes

    def torchrun(self, script: list[str]) -> list[str]:
        """The command that starts the processes by hand."""
        words = ["torchrun", f"--nproc-per-node={self.count}"]
        if self.nodes == 1:
            words.append("--standalone")
        elif self.node_rank is None:
            words += [f"--nnodes={self.nodes}", "--rdzv-backend=c10d"]
            words += [f"--rdzv-endpoint={self.rendezvous}", "--rdzv-id=denserl"]
        else:
            host, _, port = (self.rendezvous or "").rpartition(":")
            words += [f"--nnodes={self.nodes}", f"--node-rank={self.node_rank}"]
            words += [f"--master-addr={host}", f"--master-port={port}"]
        return [*words, "-m", WORKER, *script]


def visible_gpus() -> int:
    """GPUs that this machine shows to the program, without asking torch."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return len([name for name in named.split(",") if name.strip() not in ("", "-1")])
    return len(list(Path("/proc/driver/nvidia/gpus").glob("*")))


def read_processes(
    count: int | None,
    nodes: int,
    node_rank: int | None,
    rendezvous: str | None,
    hostfile: Path | None = None,
) -> Processes:
    """The processes that the command line asks for; by default one for each visible GPU.

    Where torchrun or another launcher has started them already, its count holds.

    Raises DenserlError for options that contradict each other.
    """
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return Processes(count=world_size(), started=True)
    if hostfile is not None:
        if count or nodes > 1 or node_rank is not None or rendezvous:
            raise DenserlError(
                "--hostfile names machines and processes itself",
                hint="leave out --processes, --nodes, --node-rank and --rendezvous",
            )
        return Processes(count=sum(read_hosts(hostfile).values()), hostfile=hostfile)
    if nodes > 1 and not rendezvous:
        raise DenserlError(
            "--nodes needs --rendezvous",
            hint="name HOST:PORT of the first one, on each",
        )
    if nodes > 1 and ":" not in (rendezvous or ""):
        raise DenserlError(f"--rendezvous {rendezvous}: no port", hint="write HOST:PORT")
    if node_rank is not None and not 0 <= node_rank < nodes:
        raise DenserlError(
            f"--node-rank {node_rank} of --nodes {nodes}", hint="machines are numbered from 0"
        )
    return Processes(count or max(1, visible_gpus()), nodes, node_rank, rendezvous)


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
