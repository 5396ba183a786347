"""Locks: one process at a time, and none held by a process that was killed."""

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from denserl_cli.core.errors import DenserlError
from denserl_cli.core.system import lock as locking
from denserl_cli.core.system.lock import locked, locked_in_turn
from tests import ROOT

HOLD = """
import sys, time
from pathlib import Path
from denserl_cli.core.system.lock import locked
with locked(Path(sys.argv[1]), print):
    print("held", flush=True)
    time.sleep(60)
"""


def silent(message: str) -> None:
    pytest.fail(message)


@contextmanager
def held_by_another_process(file: Path) -> Iterator[subprocess.Popen]:
    """A process that holds the lock until it is killed."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(file)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout and process.stdout.readline() == "held\n"
        yield process


def test_a_lock_file_exists_only_while_the_lock_is_held(tmp_path: Path):
    file = tmp_path / "lock"
    for _ in range(2):
        with locked(file, silent):
            holder = json.loads(file.read_text())
            assert (holder["pid"], holder["host"]) == (os.getpid(), socket.gethostname())
        assert list(tmp_path.iterdir()) == []


def test_a_second_job_hears_who_has_it_and_disturbs_nothing(tmp_path: Path):
    file = tmp_path / "lock"
    with locked(file, silent):
        since = json.loads(file.read_text())["since"]
        for _ in range(2):
            with pytest.raises(DenserlError) as caught, locked(file, silent):
                pytest.fail("two at once")
            expected = f"in use by process {os.getpid()} on {socket.gethostname()} since {since}"
            assert caught.value.message == f"{tmp_path} is {expected}"
            assert caught.value.hint and "--out" in caught.value.hint
        assert file.exists()


def test_an_error_inside_gives_the_lock_back(tmp_path: Path):
    with pytest.raises(ValueError), locked(tmp_path / "lock", silent):
        raise ValueError
    with locked(tmp_path / "lock", silent):
        pass


def test_a_killed_job_holds_nothing(tmp_path: Path):
    file = tmp_path / "lock"
    with held_by_another_process(file) as process:
        with pytest.raises(DenserlError, match=f"in use by process {process.pid} on"):
            with locked(file, silent):
                pytest.fail("two at once")
        process.send_signal(signal.SIGKILL)
    assert json.loads(file.read_text())["pid"] == process.pid  # what it left
    with locked(file, silent):
        assert json.loads(file.read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"\xff\xfe"])
def test_a_holder_that_has_not_named_itself_is_another_job(tmp_path: Path, content: bytes):
    file = tmp_path / "lock"
    file.write_bytes(content)
    with file.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(DenserlError, match="in use by another job"), locked(file, silent):
            pytest.fail("two at once")
    with locked(file, silent):
        pass


def test_a_lock_that_its_holder_removes_is_not_taken(tmp_path: Path, monkeypatch):
    """Between opening and locking, the last holder is done: what was opened is nobody's file."""
    file, real, calls = tmp_path / "lock", fcntl.flock, []

    def flock(handle: int, how: int) -> None:
        calls.append(handle)
        if len(calls) == 1:
            file.unlink()
        real(handle, how)

    monkeypatch.setattr(locking.fcntl, "flock", flock)
    with locked(file, silent):
        assert len(calls) == 2
        monkeypatch.undo()
        with pytest.raises(DenserlError), locked(file, silent):
            pytest.fail("two at once")


def test_a_folder_that_is_gone_takes_its_lock_along(tmp_path: Path):
    folder = tmp_path / "run"
    folder.mkdir()
    with locked(folder / "lock", silent):
        (folder / "lock").unlink()
        folder.rmdir()
    folder.mkdir()
    with locked(folder / "lock", silent):  # and does not touch that of who comes next
        pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_is_told(tmp_path: Path, monkeypatch, number: int):
    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(locking.fcntl, "flock", flock)
    notices: list[str] = []
    with locked(tmp_path / "lock", notices.append):
        notices.append("working")
    assert len(notices) == 2 and "cannot lock" in notices[0] and notices[1] == "working"


def test_a_folder_that_nobody_may_write_to_is_told(tmp_path: Path, monkeypatch):
    def refuse(*_: object) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(locking.os, "open", refuse)
    notices: list[str] = []
    with locked(tmp_path / "lock", notices.append):
        pass
    assert len(notices) == 1 and "Permission denied" in notices[0]


def test_other_errors_are_not_swallowed(tmp_path: Path):
    with pytest.raises(FileNotFoundError), locked(tmp_path / "gone" / "lock", silent):
        pytest.fail("no such folder")


def test_who_waits_gets_the_lock_when_the_holder_is_done(tmp_path: Path):
    file, order, waiting = tmp_path / "lock", list[str](), threading.Event()

    def wait() -> None:
        with locked_in_turn(file, waiting.set) as held:
            order.append(f"second, {held}")
            assert file.exists()

    with locked_in_turn(file, lambda: pytest.fail("nobody holds it")) as held:
        thread = threading.Thread(target=wait)
        thread.start()
        assert waiting.wait(20)
        order.append(f"first, {held}")
    thread.join(20)
    assert order == ["first, True", "second, True"]
    assert list(tmp_path.iterdir()) == []


def test_who_waits_for_a_killed_job_gets_its_lock(tmp_path: Path):
    file = tmp_path / "lock"
    with held_by_another_process(file) as process:
        with locked_in_turn(file, process.kill) as held:
            assert held and json.loads(file.read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EACCES, errno.ENOSPC])
def test_who_can_wait_goes_on_where_files_cannot_be_locked(tmp_path: Path, monkeypatch, number):
    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(locking.fcntl, "flock", flock)
    with locked_in_turn(tmp_path / "lock", lambda: pytest.fail("nobody holds it")) as held:
        assert not held
