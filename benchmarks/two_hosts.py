"""Train one reward model on two machines that are network namespaces of this one.

    sudo python benchmarks/two_hosts.py --out runs/two-hosts

Each namespace has an address of its own, joined by a pair of virtual interfaces, and runs one
process of `denserl train-rm --nodes 2` in one shared run folder: numbered by --node-rank, and once
more numbered by the rendezvous. The result must be that of one process within the tolerances of
equality.py. Then one machine's launcher is killed with -9 while both train: the other must end by
itself, soon, with one message, and --resume must end like the run that was left alone. Exits with 1
when anything of it fails. Needs root and `ip`; says so and exits with 0 where it may not.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.equality import LEARNING_RATES, PLAIN, WEIGHTS, Case, make_task, weights_apart

HOSTS = {"denserl-a": "10.231.77.1", "denserl-b": "10.231.77.2"}
PORT = 29517
CASE = Case("two hosts", 2, 2)
SOON = 60.0
"""Seconds in which the machine that is left must have ended."""


def main() -> None:
    """Run everything; print what was found."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    out: Path = parser.parse_args().out.absolute()
    shutil.rmtree(out, ignore_errors=True)
    with network() as reason:
        if reason:
            print(f"skipped: {reason}")
            return
        base = [*make_task(out / "task"), "reward_model.save_every=2", "reward_model.epochs=6"]
        finish([start(None, out / "one", [*base, *PLAIN.overrides()])])
        settings = [*base, *CASE.overrides()]
        good = True
        for name, numbered in (("numbered", True), ("unnumbered", False)):
            finish([start(host, out / name, settings, numbered=numbered) for host in HOSTS])
            good &= report(f"two hosts, {name}", out / "one", out / name)
        for name, victim in (("first killed", 0), ("second killed", 1)):
            good &= killed(out / name.replace(" ", "-"), settings, victim)
            good &= report(f"resumed, {name}", out / "numbered", out / name.replace(" ", "-"))
    sys.exit(not good)


@contextmanager
def network() -> Iterator[str | None]:
    """Make the two machines for the while; yields why that cannot be, or None."""
    if os.geteuid() or shutil.which("ip") is None:
        yield "needs root and iproute2"
        return
    first, second = HOSTS
    remove_network()
    try:
        ip("netns", "add", first)
        ip("netns", "add", second)
        ip("link", "add", "dsa", "netns", first, "type", "veth", "peer", "dsb", "netns", second)
        for host, link in ((first, "dsa"), (second, "dsb")):
            ip("-n", host, "addr", "add", f"{HOSTS[host]}/24", "dev", link)
            for each in (link, "lo"):
                ip("-n", host, "link", "set", each, "up")
    except subprocess.CalledProcessError as error:
        remove_network()
        yield f"no network namespaces here: {error.stderr.strip()}"
        return
    try:
        yield None
    finally:
        remove_network()


def remove_network() -> None:
    """Remove the namespaces and, with them, their interfaces."""
    for host in HOSTS:
        subprocess.run(["ip", "netns", "delete", host], capture_output=True)


def ip(*words: str) -> None:
    """Run `ip`. Raises CalledProcessError."""
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def start(
    host: str | None, folder: Path, settings: Sequence[str], *words: str, numbered: bool = True
) -> subprocess.Popen[str]:
    """Start train-rm on a machine, or alone."""
    sets = [word for setting in settings for word in ("--set", setting)]
    line = [sys.executable, "-m", "denserl_cli.app", "train-rm", "-r", "sandbox-segment", *sets]
    line += ["--out", str(folder), *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[1])
    if host is not None:
        number = list(HOSTS).index(host)
        environment["GLOO_SOCKET_IFNAME"] = ("dsa", "dsb")[number]
        line += ["--nodes", "2", "--processes", "1"]
        line += ["--rendezvous", f"{next(iter(HOSTS.values()))}:{PORT}"]
        line += ["--node-rank", str(number)] if numbered else []
        line = ["ip", "netns", "exec", host, *line]
    return subprocess.Popen(
        line, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def finish(machines: Sequence[subprocess.Popen[str]]) -> None:
    """Wait for a run that must succeed."""
    for machine in machines:
        try:
            _, errors = machine.communicate(timeout=300)
        except subprocess.TimeoutExpired:
            for each in machines:
                each.kill()
            sys.exit("HANGS: the machines did not finish")
        if machine.returncode:
            sys.exit(f"ended with {machine.returncode}:\n{errors}")


def killed(folder: Path, settings: Sequence[str], victim: int) -> bool:
    """Kill one machine's launcher while both train, see how the other ends, resume."""
    machines = [start(host, folder, settings) for host in HOSTS]
    log = folder / "metrics.jsonl"
    while not (log.exists() and log.read_text().count("\n") >= 5):
        if machines[victim].poll() is not None:
            sys.exit(f"ended early:\n{machines[victim].communicate()[1]}")
        time.sleep(0.02)
    machines[victim].send_signal(signal.SIGKILL)
    began = time.monotonic()
    other = machines[1 - victim]
    try:
        _, errors = other.communicate(timeout=SOON)
    except subprocess.TimeoutExpired:
        other.kill()
        print(f"HANGS: machine {1 - victim} after machine {victim} was killed")
        return False
    message = errors[errors.rfind("error:") :].strip()
    seconds = time.monotonic() - began
    print(f"machine {1 - victim} ended with {other.returncode} after {seconds:.1f} s:\n{message}")
    machines[victim].wait()
    finish([start(host, folder, settings, "--resume") for host in HOSTS])
    return other.returncode not in (0, None) and "Traceback" not in errors and "error:" in errors


def report(name: str, expected: Path, found: Path) -> bool:
    """Print how far two reward models are apart; tells whether that is within the tolerance."""
    apart = weights_apart(expected / "reward_model", found / "reward_model")
    apart /= LEARNING_RATES["train-rm"]
    print(f"{name}: weights {apart:.1e} learning rates apart", flush=True)
    return apart <= WEIGHTS


if __name__ == "__main__":
    main()
