"""Several machines through DeepSpeed's own launcher, which reads a hostfile and uses pdsh."""

from __future__ import annotations

import re
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

from denserl_cli.core.errors import DenserlError

_LINE = re.compile(r"(\S+)\s+slots=([1-9]\d*)\s*(#.*)?")


def read_hosts(file: Path) -> dict[str, int]:
    """The processes of each machine: lines of `NAME slots=N`; comments begin with #.

    Raises DenserlError, with file:line, for anything else and for a machine that comes twice.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise DenserlError(f"{file}: not UTF-8: {error}", hint="save it as UTF-8") from error
    except OSError as error:
        raise DenserlError(f"--hostfile {file}: {error.strerror}", hint="check the path") from error
    hosts: dict[str, int] = {}
    for number, line in enumerate(map(str.strip, lines), 1):
        if not line or line.startswith("#"):
            continue
        found = _LINE.fullmatch(line)
        if found is None:
            raise DenserlError(f"{file}:{number}: {line!r}", hint="write NAME slots=N")
        if found[1] in hosts:
            raise DenserlError(f"{file}:{number}: {found[1]} comes twice", hint="remove one")
        hosts[found[1]] = int(found[2])
    if not hosts:
        raise DenserlError(f"{file}: no machines", hint="write lines of NAME slots=N")
    return hosts


def launcher_command(file: Path, script: list[str]) -> list[str]:
    """The command of DeepSpeed's launcher that runs a module on the machines of a hostfile."""
    first = next(iter(read_hosts(file)))
    words = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(file.absolute())]
    # named here, or the launcher would ask the first machine through ssh
    words += ["--master_addr", "127.0.0.1" if first == "localhost" else first, "--no_ssh_check"]
    return [*words, "--no_local_rank", "--quiet", "--module", *script]


def check_launcher(file: Path) -> None:
    """Raise DenserlError when something is missing that DeepSpeed's launcher needs."""
    hosts = read_hosts(file)
    if find_spec("deepspeed") is None:
        raise DenserlError("--hostfile needs deepspeed", hint="pip install deepspeed")
    if len(hosts) > 1 and shutil.which("pdsh") is None:
        raise DenserlError(
            f"--hostfile {file}: DeepSpeed starts {len(hosts)} machines through pdsh, which is not "
            "installed",
            hint="install pdsh, or start denserl on each machine with --nodes, --node-rank and "
            "--rendezvous",
        )
    if len(hosts) > 1 and "localhost" in hosts:
        raise DenserlError(
            f"--hostfile {file}: localhost among {len(hosts)} machines",
            hint="write the name by which the others know this machine",
        )
