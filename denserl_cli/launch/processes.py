"""How many processes a stage runs in, and on which machines."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from denserl_cli.core.errors import DenserlError
from denserl_cli.core.system.distributed import world_size
from denserl_cli.launch.hostfile import is_this_machine, read_hosts

WORKER = "denserl_cli.launch.worker"
"""The module that each process runs."""


@dataclass(frozen=True)
class Processes:
    """How many processes work on a stage, and on which machines.

    count: on each machine. rendezvous: host:port of the first machine, needed for several.
    node_rank: number of this machine; None lets the rendezvous number them. started: by another
    launcher, and this is one of them; count is then that of all machines. hostfile: names several
    machines, or another one, on which ssh starts them; count is that of all machines, too.
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
        hosts = read_hosts(hostfile)
        alone = len(hosts) == 1 and is_this_machine(next(iter(hosts)))
        return Processes(sum(hosts.values()), hostfile=None if alone else hostfile)
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
