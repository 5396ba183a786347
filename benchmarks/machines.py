"""Machines that are namespaces of this one: a name, an address and processes of their own.

Each has its own network, host name, process ids and mounts; the files are shared, as on a cluster.
The processes of a machine end when it does, and all machines end with the program that made them,
also when that is killed. Needs root, iproute2 and util-linux.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

TOOLS = ("ip", "unshare", "nsenter", "setpriv")


class UnavailableError(Exception):
    """What is missing for namespaces, in words."""


class Machine:
    """One namespace machine. address: on the network that joins them, on interface `eth0`."""

    def __init__(self, name: str, network: int, number: int, hosts: Path) -> None:
        self.name, self.address, self.hosts = name, f"10.231.{network}.{number}", hosts
        self._bridge, self._cable = bridge(network), f"dnrl{network}-{number}"
        self._first: subprocess.Popen[bytes] | None = None

    def boot(self) -> None:
        """Make the network and the first process."""
        ip("netns", "add", self.name)
        ip("link", "add", self._cable, "type", "veth", "peer", "eth0", "netns", self.name)
        ip("link", "set", self._cable, "master", self._bridge, "up")
        ip("-n", self.name, "addr", "add", f"{self.address}/24", "dev", "eth0")
        for link in ("eth0", "lo"):
            ip("-n", self.name, "link", "set", link, "up")
        first = f"mount --bind {self.hosts} /etc/hosts && hostname {self.name} && exec sleep 1d"
        line = ["setpriv", "--pdeathsig", "KILL", "ip", "netns", "exec", self.name, "unshare"]
        line += ["--uts", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc"]
        self._first = subprocess.Popen([*line, "sh", "-c", first])
        while run(self.command("hostname")).stdout.strip() != self.name:
            time.sleep(0.05)

    def command(self, *words: str) -> list[str]:
        """The command line that runs a command on this machine."""
        assert self._first is not None
        children = Path(f"/proc/{self._first.pid}/task/{self._first.pid}/children")
        inner = (children.read_text().split() or ["0"])[0]
        return ["nsenter", "--target", inner, "--all", f"--wd={Path.cwd()}", "--", *words]

    def start(
        self, *words: str, environment: dict[str, str] | None = None, log: Path | None = None
    ) -> subprocess.Popen[str]:
        """Start a command; its output goes to a file, or to pipes."""
        out = log.open("a") if log else subprocess.PIPE
        return subprocess.Popen(
            self.command(*words),
            env={**os.environ, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT if log else subprocess.PIPE,
            text=True,
        )

    def processes(self, containing: str) -> list[str]:
        """The command lines of its processes that contain a text; none once it is lost."""
        if self._first is None or self._first.poll() is not None:
            return []
        lines = run(self.command("ps", "-eo", "pid=,args=")).stdout.splitlines()
        return [line for line in lines if containing in line and " ps " not in line]

    def unplug(self) -> None:
        """Take the machine off the network, without a word to the others."""
        ip("link", "set", self._cable, "down")

    def lose(self) -> None:
        """End the machine as a power cut does: off the network first, then every process."""
        self.unplug()
        self.halt()

    def halt(self) -> None:
        """End every process of the machine."""
        if self._first is not None:
            self._first.kill()  # the machine's process 1 dies with it, and then all others
            self._first.wait()

    def remove(self) -> None:
        """Remove everything that `boot` has made."""
        self.halt()
        subprocess.run(["ip", "link", "delete", self._cable], capture_output=True)
        subprocess.run(["ip", "netns", "delete", self.name], capture_output=True)


def bridge(network: int) -> str:
    """The interface that joins the machines of a network."""
    return f"dnrl{network}"


@contextmanager
def booted(names: Sequence[str], folder: Path, network: int) -> Iterator[list[Machine]]:
    """Boot machines that know each other by name.

    Args:
        names: of the machines.
        folder: for the file of their names.
        network: a number from 0 to 255 that nobody else uses on this machine.

    Raises:
        UnavailableError: namespaces cannot be made here.
    """
    if os.geteuid():
        raise UnavailableError("needs root")
    if missing := [tool for tool in TOOLS if shutil.which(tool) is None]:
        raise UnavailableError(f"needs {', '.join(missing)}")
    hosts = folder / "hosts"
    made = [Machine(name, network, number, hosts) for number, name in enumerate(names, 1)]
    lines = ["127.0.0.1 localhost", *(f"{one.address} {one.name}" for one in made)]
    hosts.write_text("\n".join(lines) + "\n")
    before = signal.signal(signal.SIGTERM, lambda *_: os.kill(os.getpid(), signal.SIGINT))
    try:
        try:
            ip("link", "add", bridge(network), "type", "bridge")
            ip("link", "set", bridge(network), "up")
            for one in made:
                one.boot()
        except subprocess.CalledProcessError as error:
            raise UnavailableError(f"no network namespaces here: {error.stderr.strip()}") from error
        yield made
    finally:
        for one in made:
            one.remove()
        subprocess.run(["ip", "link", "delete", bridge(network)], capture_output=True)
        signal.signal(signal.SIGTERM, before)


def ip(*words: str) -> None:
    """Run `ip`. Raises CalledProcessError."""
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def run(words: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, with its output as text."""
    return subprocess.run(words, capture_output=True, text=True)
