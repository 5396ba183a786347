"""A hostfile, as DeepSpeed's launcher reads it: machines and the processes on each."""

from __future__ import annotations

import re
import socket
from pathlib import Path

from denserl_cli.core.errors import DenserlError

_LINE = re.compile(r"([^\s-]\S*)\s+slots=([1-9]\d*)\s*(#.*)?")


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
    if len(hosts) > 1 and "localhost" in hosts:
        raise DenserlError(
            f"{file}: localhost among {len(hosts)} machines",
            hint="write the name by which the others know this machine",
        )
    return hosts


def is_this_machine(name: str) -> bool:
    """Whether a name leads to an address of this machine."""
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except OSError:
        return False
    for family, kind, _, _, address in found:
        with socket.socket(family, kind) as attempt:
            try:
                attempt.bind((address[0], 0))
            except OSError:
                continue
            return True
    return False
