"""What the script of `denserl slurm` does on a real Slurm.

    sudo python benchmarks/slurm_cluster.py --out runs/slurm [--only NAME ...]

Slurm comes from Debian's packages (apt install slurmd slurmctld slurm-client munge) and runs on
machines that are namespaces of this one. train-rm works in one process on each of two nodes: left
alone; past its time limit, until its end, which must have the same bytes; preempted by another
job; with a node that is lost, or that cannot start; and cancelled. Ten seconds after each job has
ended no process of it may be alive. Prints what it saw and exits with 1 when anything of it fails;
says so and exits with 0 where it may not run.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.equality import Case, make_task
from benchmarks.machines import UnavailableError, run
from benchmarks.slurm import Cluster, cluster, version

ROOT = Path(__file__).parents[1]
CASE = Case("two nodes", 2, 2)
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
GONE = 10.0
"""Seconds after the end of a job when none of its processes may be alive."""
WEIGHTS = Path("reward_model") / "model.safetensors"


class Check:
    """A cluster and the task of every job on it."""

    def __init__(self, out: Path, slurm: Cluster, settings: Sequence[str]) -> None:
        self.out, self.slurm, self.settings = out, slurm, settings

    def submit(self, name: str, epochs: int, *words: str, environment: str = "") -> str:
        """Write the script of a job as a user does, and submit it."""
        sets = [*self.settings, *CASE.overrides(), f"reward_model.epochs={epochs}"]
        file = self.out / f"{name}.sbatch"
        line = [sys.executable, "-m", "denserl_cli.app", "slurm", "-r", "sandbox-segment"]
        line += ["--stage", "train-rm", *(w for s in sets for w in ("--set", s)), "--nodes", "2"]
        line += ["--gpus-per-node", "1", "--out", str(self.out / name), "--to", str(file), *words]
        line += [f"--sbatch=--output={self.out / name}.log"]
        done = run(line)
        if done.returncode:
            raise RuntimeError(done.stderr)
        if environment:  # before the stage starts, on every node
            text = file.read_text().replace('\'exec "$@"', f'\'{environment}; exec "$@"')
            file.write_text(text)
        return self.slurm.submit(file, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")

    def wait_for_steps(self, name: str, count: int, seconds: float = 180) -> None:
        """Wait until so many steps are logged."""
        log, until = self.out / name / "metrics.jsonl", time.monotonic() + seconds
        while not (log.exists() and log.read_text().count("\n") >= count):
            if time.monotonic() > until:
                raise RuntimeError(f"{name} has not come to step {count}:\n{self.log(name)}")
            time.sleep(0.1)

    def log(self, name: str) -> str:
        """What a job has printed."""
        file = self.out / f"{name}.log"
        return file.read_text() if file.exists() else ""

    def same_bytes(self, name: str, other: str) -> bool:
        """Whether two runs have ended with the same weights."""
        return (self.out / name / WEIGHTS).read_bytes() == (self.out / other / WEIGHTS).read_bytes()

    def alive(self, name: str) -> list[str]:
        """Processes of a job that live ten seconds after its end."""
        time.sleep(GONE)
        text = str(self.out / name)
        return [line for node in self.slurm.nodes for line in node.processes(text)]


def left_alone(check: Check) -> bool:
    """A job that nothing happens to."""
    job = check.slurm.wait(check.submit("alone", 6), ENDED, 300)
    return say("run", job, check, "alone", job["JobState"] == "COMPLETED")


def time_limit(check: Check) -> bool:
    """A job whose time limit is too short for it."""
    whole = check.slurm.wait(check.submit("whole", 120), ENDED, 900)
    number = check.submit("limited", 120, "--time", "2", "--notice", "60")
    job = check.slurm.wait(number, ENDED, 1800)
    good = job["JobState"] == whole["JobState"] == "COMPLETED" and int(job["Restarts"]) > 0
    good = good and check.same_bytes("whole", "limited")
    return say("time limit, resumed to the same bytes", job, check, "limited", good)


def preempted(check: Check) -> bool:
    """A job that has to give way to another one, and comes back."""
    number = check.submit("preempted", 40)
    check.wait_for_steps("preempted", 10)
    other = check.out / "urgent.sbatch"
    other.write_text("#!/bin/bash\n#SBATCH --nodes=2 --exclusive --partition=high\nsleep 20\n")
    check.slurm.submit(other, f"--output={check.out / 'urgent.log'}")
    job = check.slurm.wait(number, ENDED, 600)
    good = job["JobState"] == "COMPLETED" and int(job["Restarts"]) == 1
    good = good and "resuming after step" in check.log("preempted")
    return say("preemption", job, check, "preempted", good)


def node_lost(check: Check) -> bool:
    """A node that disappears: the job comes back when it does."""
    number = check.submit("lost", 40)
    check.wait_for_steps("lost", 10)
    gone = check.slurm.nodes[1]
    gone.halt()
    began = time.monotonic()
    while "denserl" in " ".join(check.slurm.nodes[0].processes(str(check.out / "lost"))):
        time.sleep(0.5)
    seconds = time.monotonic() - began
    gone.remove()
    gone.boot()
    check.slurm.start(gone)
    job = check.slurm.wait(number, ENDED, 600)
    good = job["JobState"] == "COMPLETED" and int(job["Restarts"]) == 1 and seconds < 90
    print(f"    the other node's processes ended after {seconds:.0f} s")
    return say("node loss", job, check, "lost", good)


def cannot_start(check: Check) -> bool:
    """A node on which the command does not start must not hold the other until the limit."""
    words = 'if [ "$SLURM_NODEID" = 1 ]; then exit 127; fi'
    began = time.monotonic()
    job = check.slurm.wait(check.submit("broken", 6, environment=words), ENDED, 420)
    seconds = time.monotonic() - began
    print(f"    ended after {seconds:.0f} s")
    good = job["JobState"] == "FAILED" and job["Restarts"] == "0" and seconds < 400
    return say("node that cannot start", job, check, "broken", good)


def cancelled(check: Check) -> bool:
    """A job that its user cancels while it works, and one that still waits for its machines."""
    number = check.submit("cancelled", 400)
    check.wait_for_steps("cancelled", 10)
    check.slurm.ask("scancel", number)
    job = check.slurm.wait(number, ENDED, 120)
    return say("scancel", job, check, "cancelled", job["JobState"] == "CANCELLED")


def say(what: str, job: dict[str, str], check: Check, name: str, good: bool) -> bool:
    """Print what has become of a job; tells whether it is as it should be."""
    alive = check.alive(name)
    facts = f"{job['JobState']}, exit code {job['ExitCode']}, restarts {job['Restarts']}"
    print(f"{'ok' if good and not alive else 'FAILED'}: {what}: {facts}", flush=True)
    for line in alive:
        print(f"    still alive: {line}")
    if not good:
        print(check.log(name)[-3000:])
    return good and not alive


CHECKS: dict[str, Callable[[Check], bool]] = {
    "run": left_alone,
    "scancel": cancelled,
    "preemption": preempted,
    "node-loss": node_lost,
    "node-that-cannot-start": cannot_start,
    "time-limit": time_limit,
}


def main() -> None:
    """Bring Slurm up and run everything."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="*", choices=list(CHECKS), default=list(CHECKS))
    arguments = parser.parse_args()
    out: Path = arguments.out.absolute()
    shutil.rmtree(out, ignore_errors=True)
    os.environ["PYTHONPATH"] = str(ROOT)
    try:
        with cluster(out / "slurm", 2) as slurm:
            print(version(), flush=True)
            settings = [*make_task(out / "task"), "reward_model.save_every=5"]
            check = Check(out, slurm, settings)
            failed = [name for name in arguments.only if not CHECKS[name](check)]
    except UnavailableError as error:
        print(f"skipped: {error}")
        return
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
