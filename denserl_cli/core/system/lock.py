"""One job at a time: a lock that the kernel lets go of when its holder dies, by kill -9 as well."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from denserl_cli.core.errors import DenserlError

_READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
"""What file systems answer that know no locks, such as Lustre and NFS without them."""


@contextmanager
def locked(file: Path, notice: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock `file`, which exists for the while.

    Where the file system has no locks, or lets nobody write, a notice says so and the work goes on
    without. Raises DenserlError, naming the holder, when another job has it.
    """
    handle = None
    try:
        handle = _acquire(file)
    except OSError as error:
        if error.errno not in (*_READ_ONLY, *_NO_LOCKS):
            raise
        reason = error.strerror
        notice(f"cannot lock {file} ({reason}): see to it that no other job uses this folder")
    try:
        yield
    finally:
        if handle is not None:
            if _is_open_as(handle, file):
                file.unlink()
            os.close(handle)


def _acquire(file: Path) -> int:
    """Open, lock and sign the file; returns its descriptor."""
    while True:
        handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_open_as(handle, file):  # otherwise its last holder has just removed it
                now = datetime.now().astimezone().isoformat(" ", "seconds")
                holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": now}
                os.ftruncate(handle, 0)
                os.write(handle, json.dumps(holder).encode())
                return handle
        except BlockingIOError:
            holder_now = _read_holder(handle)
            os.close(handle)
            raise DenserlError(
                f"{file.parent} is in use by {holder_now}",
                hint="wait until it is done, stop it, or name another folder with --out",
            ) from None
        except OSError:
            os.close(handle)
            raise
        os.close(handle)


def _is_open_as(handle: int, file: Path) -> bool:
    """Whether the path still leads to the open file."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(file))
    except FileNotFoundError:
        return False


def _read_holder(handle: int) -> str:
    try:
        holder = json.loads(os.pread(handle, 4096, 0))
        return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    except (ValueError, KeyError, TypeError):  # it has not signed yet
        return "another job"
