from __future__ import annotations

import errno
import os

import pytest

from denserl_cli.core.errors import read_os_error


@pytest.mark.parametrize(
    ("number", "remedy"),
    [(errno.ENOSPC, "free space"), (errno.EROFS, "name a folder"), (errno.EACCES, "name a folder")],
)
def test_what_can_be_mended_comes_with_how(number: int, remedy: str):
    error = read_os_error(OSError(number, os.strerror(number), "/there/x"))
    assert error.message == f"/there/x: {os.strerror(number)}"
    assert error.hint is not None and error.hint.startswith(remedy) and error.exit_code == 2


def test_other_errors_keep_their_words():
    error = read_os_error(OSError("odd"))
    assert (error.message, error.hint) == ("odd", None)
