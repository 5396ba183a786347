"""Files that are whole or absent: written aside, synced, renamed into place."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


def write_text(path: Path, text: str) -> None:
    """Write a text file aside and rename it into place."""
    with replaced_file(path) as file:
        file.write(text.encode("utf-8"))


@contextmanager
def replaced_file(path: Path) -> Iterator[BinaryIO]:
    """Yield a file to write; on success it becomes `path`, on failure it is removed.

    A device or a pipe is written to directly.
    """
    if is_stream(path):
        with path.open("wb") as file:
            yield file
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with aside.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except BaseException as error:
        with suppress(OSError):
            aside.unlink()
        if isinstance(error, OSError) and error.filename in (None, str(aside)):
            # the caller knows this name, not the one aside
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    aside.replace(path)
    sync(path.parent)


def is_stream(path: Path) -> bool:
    """Whether a path is a device, a pipe or a process's open file, such as /dev/stdout."""
    opened = path.is_symlink() and path.absolute().parts[1] in ("dev", "proc")
    return opened or (path.exists() and not path.is_file() and not path.is_dir())


@contextmanager
def replaced_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder to fill; on success it becomes `path`, on failure it is removed.

    An earlier `path` stays until the new one is complete.

    Raises:
        OSError: with ENOSPC when the disk is full, whatever error the writing library raised.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = aside_of(path)
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        with full_disk_named(path):
            yield aside
            sync_folder(aside)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    old = path.with_name(f".{path.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)
    aside.rename(path)
    sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def full_disk_named(path: Path) -> Iterator[None]:
    """Raise OSError with ENOSPC for a full disk, whatever error the writing library raised."""
    try:
        yield
    except BaseException as error:
        if _is_full_disk(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise


def clear_leftovers(folder: Path) -> None:
    """Clean up a folder in which processes were killed while they wrote.

    Unfinished files and folders are removed; an original that was moved away is put back.
    """
    for old in folder.glob(".*.old"):
        original = folder / old.name[1 : -len(".old")]
        if original.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(original)
    for aside in folder.glob(".*.tmp"):
        if aside.is_dir():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside.unlink(missing_ok=True)


def aside_of(path: Path) -> Path:
    """Where `replaced_folder` fills what becomes `path`."""
    return path.with_name(f".{path.name}.tmp")


def sync_folder(folder: Path) -> None:
    """Sync a folder and everything below it to the disk."""
    for path in (folder, *folder.rglob("*")):
        sync(path)


def sync(path: Path) -> None:
    """Sync a file's content, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _is_full_disk(error: BaseException | None) -> bool:
    """Whether the disk was full, also where a library has wrapped that in an error of its own."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if os.strerror(errno.ENOSPC) in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
