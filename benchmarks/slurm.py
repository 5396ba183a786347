"""A real Slurm of Debian's packages, one daemon a machine of `machines.py`."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from benchmarks.machines import Machine, UnavailableError, booted, run

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
_PATHS = f"{os.environ['PATH']}:/usr/sbin"
_CONF = """\
ClusterName=denserl
SlurmctldHost={controller}({address})
SlurmUser=root
AuthType=auth/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
MailProg=/bin/true
SlurmdTimeout=15
InactiveLimit=0
KillWait=20
MinJobAge=86400
JobRequeue=1
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%h
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%h.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%h.log
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=1,sched_interval=5,requeue_delay=1
PartitionName=low Nodes={nodes} Default=YES PriorityTier=1 GraceTime=60 MaxTime=INFINITE State=UP
PartitionName=high Nodes={nodes} PriorityTier=10 PreemptMode=OFF State=UP
"""


class Cluster:
    """A running Slurm. nodes: the machines that work, without the one of the controller."""

    def __init__(self, folder: Path, controller: Machine, nodes: list[Machine]) -> None:
        self.folder, self.controller, self.nodes = folder, controller, nodes
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": _PATHS}

    def ask(self, *words: str, **environment: str) -> str:
        """Run one of Slurm's commands on the controller; returns what it prints."""
        line = [f"{name}={value}" for name, value in {**self.environment, **environment}.items()]
        done = run(self.controller.command("env", *line, *words))
        if done.returncode:
            raise RuntimeError(f"{' '.join(words)}: {done.stderr}")
        return done.stdout

    def submit(self, script: Path, *words: str, **environment: str) -> str:
        """Submit a script; returns the job's number."""
        said = self.ask("sbatch", "--parsable", *words, str(script), **environment)
        return said.strip().partition(";")[0]

    def job(self, number: str) -> dict[str, str]:
        """What Slurm knows of a job."""
        text = self.ask("scontrol", "show", "job", number)
        return dict(re.findall(r"(\S+?)=(\S*)", text))

    def wait(self, number: str, states: tuple[str, ...], seconds: float) -> dict[str, str]:
        """Wait until a job is in one of the states."""
        until = time.monotonic() + seconds
        while (found := self.job(number))["JobState"] not in states:
            if time.monotonic() > until:
                raise RuntimeError(f"job {number} is {found['JobState']} after {seconds:.0f} s")
            time.sleep(0.5)
        return found

    def start(self, node: Machine) -> None:
        """Start the daemons of a machine that works."""
        self._munge(node)
        line = [f"{name}={value}" for name, value in self.environment.items()]
        log = self.folder / f"{node.name}.out"
        node.start("env", *line, "slurmd", "-D", log=log)

    def serve(self) -> None:
        """Start the controller and every node."""
        self._munge(self.controller)
        line = [f"{name}={value}" for name, value in self.environment.items()]
        self.controller.start("env", *line, "slurmctld", "-D", log=self.folder / "ctld.out")
        for node in self.nodes:
            self.start(node)
        until = time.monotonic() + 30
        while True:
            try:
                if "idle" in (states := self.ask("sinfo", "-h", "-o", "%T %D", "-p", "low")):
                    if f"idle {len(self.nodes)}" in states:
                        return
            except RuntimeError as error:
                states = str(error)
            if time.monotonic() > until:
                raise RuntimeError(f"Slurm does not come up: {states}")
            time.sleep(0.5)

    def _munge(self, machine: Machine) -> None:
        """Start munged with files of the machine's own."""
        place = self.folder / f"munge-{machine.name}"
        place.mkdir(mode=0o700, exist_ok=True)
        files = [f"--{name}-file={place / name}" for name in ("log", "pid", "seed")]
        key = f"--key-file={self.folder / 'munge.key'}"
        words = ["munged", "--foreground", "--force", key, *files]
        own = "mkdir -p /run/munge && mount -t tmpfs none /run/munge && chmod 755 /run/munge"
        run(machine.command("sh", "-c", own))
        machine.start("env", f"PATH={_PATHS}", *words, log=place / "out")
        while not run(machine.command("ls", "/run/munge/munge.socket.2")).stdout:
            time.sleep(0.05)


@contextmanager
def cluster(folder: Path, nodes: int) -> Iterator[Cluster]:
    """Bring up Slurm in a folder; raises UnavailableError where it is not installed."""
    if missing := [name for name in PROGRAMS if shutil.which(name, path=_PATHS) is None]:
        raise UnavailableError(
            f"needs {', '.join(missing)}: apt install slurmd slurmctld slurm-client munge"
        )
    folder.mkdir(parents=True)
    (folder / "state").mkdir()
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o400)
    names = ["control", *(f"node{number}" for number in range(1, nodes + 1))]
    with ExitStack() as stack:
        controller, *working = stack.enter_context(booted(names, folder, network=78))
        text = _CONF.format(
            controller=controller.name,
            address=controller.address,
            folder=folder,
            nodes=f"node[1-{nodes}]",
        )
        lines = [
            f"NodeName={node.name} NodeAddr={node.address} CPUs=1 Gres=gpu:1" for node in working
        ]
        head, first, rest = text.partition("PartitionName")
        (folder / "slurm.conf").write_text(head + "\n".join(lines) + "\n" + first + rest)
        (folder / "gres.conf").write_text("Name=gpu Count=1 File=/dev/null\n")
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        found = Cluster(folder, controller, working)
        found.serve()
        yield found


def version() -> str:
    """The version of Slurm."""
    words = [shutil.which("slurmd", path=_PATHS) or "slurmd", "-V"]
    return subprocess.run(words, capture_output=True, text=True).stdout.strip()
