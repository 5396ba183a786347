"""One process at a time: a file lock that the kernel releases when its holder dies, by kill -9 too.

Why not the library `filelock`: a run folder's lock has to name its holder, and filelock offers no
way to write into the file that it locks; in versions 3.16 to 3.25 the attempt of a second process
even empties that file. Where a file system has no `flock`, version 4 falls back to a marker file,
which a killed holder leaves behind.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from denserl_cli.core.errors import DenserlError

_READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
"""What file systems answer that have no locks, such as Lustre and NFS without them."""


@contextmanager
def locked(file: Path, notice: Callable[[str], None]) -> Iterator[None]:
    """Hold a lock, or refuse to work because another job holds it.

    Where the file system has no locks, or the folder is read-only, the work goes on without.

    Args:
        file: the lock file; it exists only while the lock is held, and names the holder.
        notice: is told when nothing can be locked here.

    Raises:
        DenserlError: another job holds the lock; the message names its process, host and start.
    """
    handle = None
    try:
        handle = _acquire(file)
    except _HeldError as other:
        raise DenserlError(
            f"{file.parent} is in use by {other}",
            hint="wait until it is done, stop it, or name another folder with --out",
        ) from None
    except OSError as error:
        if error.errno not in (*_READ_ONLY, *_NO_LOCKS):
            raise
        reason = error.strerror
        notice(f"cannot lock {file} ({reason}): make sure that no other job uses this folder")
    try:
        yield
    finally:
        if handle is not None:
            _release(handle, file)


@contextmanager
def locked_in_turn(file: Path, waiting: Callable[[], None]) -> Iterator[bool]:
    """Hold a lock; while another process holds it, wait.

    Args:
        file: the lock file; it exists only while the lock is held or waited for.
        waiting: is called once before the wait.

    Yields:
        Whether the lock is held; False where the file cannot be locked.
    """
    handle = None
    try:
        handle = _acquire(file)
    except _HeldError:
        waiting()
        with suppress(OSError):
            handle = _acquire(file, wait=True)
    except OSError:
        pass
    try:
        yield handle is not None
    finally:
        if handle is not None:
            _release(handle, file)


class Holder(NamedTuple):
    """The process that holds a lock. since: when it took it."""

    pid: int
    host: str
    since: str


def holder(file: Path) -> tuple[Holder | None, bool]:
    """Who holds a lock, and whether that can be known: not on file systems without locks."""
    try:
        handle = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None, True
    except OSError:
        return None, False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _signature(handle) or Holder(0, "unknown", "unknown"), True
    except OSError:
        return None, False
    finally:
        os.close(handle)
    return None, True


class _HeldError(Exception):
    """Another process holds the lock; the message says which."""


def _acquire(file: Path, wait: bool = False) -> int:
    """Open and lock the file and write the holder into it; returns its descriptor.

    Raises _HeldError when another process holds the lock and `wait` is not set.
    """
    while True:
        handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if _is_open_as(handle, file):  # otherwise its last holder has just removed it
                now = datetime.now().astimezone().isoformat(" ", "seconds")
                holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": now}
                os.ftruncate(handle, 0)
                os.write(handle, json.dumps(holder).encode())
                return handle
        except BlockingIOError:
            held = _HeldError(_read_holder(handle))
            os.close(handle)
            raise held from None
        except BaseException:  # KeyboardInterrupt ends a wait
            os.close(handle)
            raise
        os.close(handle)


def _release(handle: int, file: Path) -> None:
    if _is_open_as(handle, file):
        file.unlink()
    os.close(handle)


def _is_open_as(handle: int, file: Path) -> bool:
    """Whether the path still leads to the open file."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(file))
    except FileNotFoundError:
        return False


def _signature(handle: int) -> Holder | None:
    """What the holder has written into the file; None while it has not."""
    try:
        found = json.loads(os.pread(handle, 4096, 0))
        return Holder(int(found["pid"]), str(found["host"]), str(found["since"]))
    except (ValueError, KeyError, TypeError):
        return None


def _read_holder(handle: int) -> str:
    found = _signature(handle)
    if found is None:
        return "another job"
    return f"process {found.pid} on {found.host} since {found.since}"
