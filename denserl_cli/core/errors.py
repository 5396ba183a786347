"""Errors that a user can correct. Every other exception is a bug and keeps its traceback."""

from __future__ import annotations

import errno
from collections.abc import Sequence

_ROOM = "free space on the disk, then run the command again; a stage goes on with --resume"
_ELSEWHERE = "name a folder that can be written, or change its permissions"
_REMEDIES = {
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: _ROOM,
    errno.EROFS: _ELSEWHERE,
    errno.EACCES: _ELSEWHERE,
    errno.EPERM: _ELSEWHERE,
}


class DenserlError(Exception):
    """An error that the user can correct: shown as one message, exit code 2.

    message: where and what. hint: what to do about it. is_told: another process of the job, whose
    output goes to the same place, shows it.
    """

    exit_code = 2
    is_told = False

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class RecipeError(DenserlError):
    """All problems of one recipe at once, each already `where: what, what to do`."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)


def read_os_error(error: OSError) -> DenserlError:
    """An OSError as a DenserlError, with a hint for full disks and missing permissions."""
    where = f"{error.filename}: " if error.filename else ""
    return DenserlError(f"{where}{error.strerror or error}", hint=_REMEDIES.get(error.errno or 0))


def refuse(problems: Sequence[str], hint: str, shown: int = 20) -> None:
    """Raise DenserlError with the problems of a file, at most `shown` of them, if there are any."""
    if problems:
        more = [f"and {len(problems) - shown} more"] if len(problems) > shown else []
        raise DenserlError("\n".join([*problems[:shown], *more]), hint=hint)


class ServiceError(DenserlError):
    """A service outside the job failed, such as a server; the job's own state is whole."""


class Interrupted(DenserlError):
    """The user or the scheduler asked the run to stop. signal: its number, where one is known."""

    exit_code = 130
    signal: int | None = None


def exit_code_of(error: BaseException) -> int:
    """The exit code of a program that ends with an exception."""
    if isinstance(error, KeyboardInterrupt):
        return Interrupted.exit_code
    if isinstance(error, OSError):
        return DenserlError.exit_code
    return error.exit_code if isinstance(error, DenserlError) else 1
