"""What `--hostfile` does through a real sshd on each of two machines.

    sudo python benchmarks/ssh_hosts.py --out runs/ssh [--only NAME ...]

The machines are namespaces of this one, each with an sshd of its own (apt install openssh-server),
with 2 and 1 processes. train-rm works on both: left alone, from a folder whose name a shell would
read; stopped by SIGTERM and resumed to the same bytes; with its launcher killed; with a machine
that is lost; with one that cannot be reached; and on one other machine alone. Ten seconds after
each launcher has ended no process may be alive on any machine that is left. Exits with 1 when
anything of it fails; says so and exits with 0 where it may not run.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.equality import Case, make_task
from benchmarks.machines import Machine, UnavailableError, booted, run

ROOT = Path(__file__).parents[1]
CASE = Case("two machines", 2, 3)
GONE = 10.0
"""Seconds after the end of a launcher when none of its job's processes may be alive."""
WEIGHTS = Path("reward_model") / "model.safetensors"
_PATHS = f"{os.environ['PATH']}:/usr/sbin"


class Check:
    """Two machines and the task of every job on them."""

    def __init__(self, out: Path, machines: Sequence[Machine], settings: Sequence[str]) -> None:
        self.out, self.machines = out, machines
        self.here = out / "R&D of 'a b'; $(touch oops)"
        self.here.mkdir()
        sets = [*settings, *CASE.overrides(), "reward_model.batch_size=6", "reward_model.epochs=12"]
        self.words = [sys.executable, "-m", "denserl_cli.app", "train-rm", "-r", "sandbox-segment"]
        self.words += [word for setting in sets for word in ("--set", setting)]

    def start(
        self, name: str, *words: str, hosts: str = "one slots=2\ntwo slots=1\n"
    ) -> subprocess.Popen[str]:
        """Start a job from the first machine, as a user does."""
        (self.here / "hosts").write_text(hosts)
        line = ["sh", "-c", 'cd "$1" && shift && exec "$@"', "sh", str(self.here), *self.words]
        line += ["--hostfile", "hosts", "--out", name, *words]
        environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        environment["PDSH_SSH_ARGS_APPEND"] = (
            f"-i {self.out}/key -o UserKnownHostsFile={self.out}/known -o StrictHostKeyChecking=no"
        )
        return self.machines[0].start(*line, environment=environment)

    def wait_for_steps(self, job: subprocess.Popen[str], name: str, count: int) -> None:
        """Wait until a job has logged so many steps."""
        log = self.here / name / "metrics.jsonl"
        while not (log.exists() and log.read_text().count("\n") >= count):
            if job.poll() is not None:
                raise RuntimeError(f"{name} ended early: {job.communicate()[1]}")
            time.sleep(0.1)

    def launcher(self) -> int:
        """The launcher's process id on this machine, below nsenter."""
        lines = run(["ps", "-eo", "pid=,args="]).stdout.splitlines()
        found = [line.split() for line in lines if " --hostfile hosts" in line]
        return int(next(words[0] for words in found if words[1] == sys.executable))

    def end(self, what: str, job: subprocess.Popen[str], codes: Sequence[int], words: str) -> bool:
        """Wait for the end of a job and look what is left of it."""
        _, errors = job.communicate(timeout=300)
        time.sleep(GONE)
        names = ("denserl_cli.launch.worker", "denserl_cli.launch.ssh")
        alive = [p for one in self.machines for name in names for p in one.processes(name)]
        shown = [
            line for line in errors.splitlines() if line.startswith(("error:", "interrupted:"))
        ]
        good = job.returncode in codes and words in errors and len(shown) <= 1 and not alive
        print(
            f"{'ok' if good else 'FAILED'}: {what}: exit code {job.returncode}",
            *shown,
            sep="\n    ",
        )
        for line in alive:
            print(f"    still alive: {line}")
        if not good:
            print(errors[-2000:])
        sys.stdout.flush()
        return good and not list(self.out.rglob("oops"))


def left_alone(check: Check) -> bool:
    """A job that nothing happens to."""
    return check.end("run", check.start("alone"), [0], "")


def stopped(check: Check) -> bool:
    """A job that a scheduler stops, resumed."""
    job = check.start("stopped")
    check.wait_for_steps(job, "stopped", 10)
    os.kill(check.launcher(), signal.SIGTERM)
    good = check.end("SIGTERM", job, [75], "interrupted: stopped after step")
    good &= check.end("resumed", check.start("stopped", "--resume"), [0], "resuming after step")
    same = [(check.here / name / WEIGHTS).read_bytes() for name in ("alone", "stopped")]
    print(f"    {'the same' if same[0] == same[1] else 'OTHER'} bytes as the job left alone")
    return good and same[0] == same[1]


def killed(check: Check) -> bool:
    """A job whose launcher is killed."""
    job = check.start("killed")
    check.wait_for_steps(job, "killed", 10)
    os.kill(check.launcher(), signal.SIGKILL)
    return check.end("launcher killed", job, [-9, 137], "")


def unreachable(check: Check) -> bool:
    """A hostfile that names a machine that is not there."""
    began = time.monotonic()
    job = check.start("never", hosts="one slots=2\nthree slots=1\n")
    good = check.end("unreachable host", job, [2], "three: ")
    return good and time.monotonic() - began < 60


def one_other(check: Check) -> bool:
    """A hostfile that names the other machine alone."""
    job = check.start("other", hosts="two slots=3\n")
    check.wait_for_steps(job, "other", 3)
    there = [len(one.processes("denserl_cli.launch.worker")) for one in check.machines]
    os.kill(check.launcher(), signal.SIGTERM)
    good = check.end("one other machine", job, [75], "interrupted:")
    print(f"    processes on each machine: {there}")
    return good and there[0] == 0 and there[1] == 3


def lost(check: Check) -> bool:
    """A machine that disappears; the last check."""
    job = check.start("lost")
    check.wait_for_steps(job, "lost", 10)
    began = time.monotonic()
    check.machines[1].halt()
    good = check.end("machine lost", job, [1], "error:")
    print(f"    {time.monotonic() - began - GONE:.0f} s after it was lost")
    return good


CHECKS: dict[str, Callable[[Check], bool]] = {
    "run": left_alone,
    "stopped": stopped,
    "killed": killed,
    "unreachable": unreachable,
    "one-other": one_other,
    "lost": lost,
}


def main() -> None:
    """Bring the machines up and run everything."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="*", choices=list(CHECKS), default=list(CHECKS))
    arguments = parser.parse_args()
    out: Path = arguments.out.absolute()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    try:
        sshd = shutil.which("sshd", path=_PATHS)
        if sshd is None:
            raise UnavailableError("needs sshd: apt install openssh-server")
        with booted(["one", "two"], out, network=79) as machines:
            for one in machines:
                serve(sshd, one, out)
            check = Check(out, machines, [*make_task(out / "task"), "reward_model.save_every=5"])
            failed = [name for name in arguments.only if not CHECKS[name](check)]
    except UnavailableError as error:
        print(f"skipped: {error}")
        return
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


def serve(sshd: str, machine: Machine, out: Path) -> None:
    """Start sshd on a machine, for one key that is made here."""
    key = out / "key"
    if not key.exists():
        run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)])
        shutil.copy(f"{key}.pub", out / "authorized")
    config = out / "sshd_config"
    config.write_text(
        f"HostKey {key}\nAuthorizedKeysFile {out}/authorized\nStrictModes no\nUsePAM no\n"
        "PermitRootLogin prohibit-password\nPidFile none\n"
    )
    run(machine.command("sh", "-c", "mkdir -p /run/sshd"))
    machine.start(sshd, "-D", "-e", "-f", str(config), log=out / f"sshd-{machine.name}.log")


if __name__ == "__main__":
    main()
