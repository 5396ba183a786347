"""Signals that ask a stage to stop: finish the step, write a checkpoint, leave.

Ctrl-C (SIGINT) comes from people; SIGTERM and SIGUSR1 from schedulers, a while before they kill.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any

from denserl_cli.core.errors import Interrupted

REQUEUE = os.EX_TEMPFAIL
"""Exit code 75 of a stage that a scheduler stopped: run it again with --resume."""
_FROM_SCHEDULERS = (signal.SIGTERM, signal.SIGUSR1)


class Stopped(KeyboardInterrupt):
    """A scheduler's signal; raised where it finds the program, as Ctrl-C raises its base."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def stoppable(work: str) -> Iterator[None]:
    """Let schedulers' signals end `work` at once, and in order, with `Interrupted`."""
    try:
        with _handling(_FROM_SCHEDULERS, _stop_now):
            yield
    except Stopped as stopped:
        raise stopped_at_once(stopped.number, work) from None


def stopped_at_once(number: int, work: str = "the job") -> Interrupted:
    """What to say when a signal has ended work without a checkpoint."""
    error = Interrupted(
        f"{work} was stopped at once by {signal.Signals(number).name}; what was done since the "
        "last checkpoint, if there is one, is lost",
        hint="go on with --resume",
    )
    if number in _FROM_SCHEDULERS:
        error.exit_code = REQUEUE
    return error


@contextmanager
def stop_requested() -> Iterator[Callable[[], bool]]:
    """Yield a function that tells whether Ctrl-C or a scheduler has asked to stop since.

    A second signal stops at once, as the first does outside this context; a scheduler's must differ
    from the first, which may arrive twice. An `Interrupted` that leaves the context gets the exit
    code that belongs to the signal.
    """
    asked: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        if number in asked and number in _FROM_SCHEDULERS:
            return  # one from the scheduler itself, the same one from the launcher
        if asked:
            _stop_now(number, frame)
        asked.append(number)

    with _handling((signal.SIGINT, *_FROM_SCHEDULERS), remember):
        try:
            yield lambda: bool(asked)
        except Interrupted as error:
            if asked and asked[0] in _FROM_SCHEDULERS:
                error.exit_code = REQUEUE
            raise
        except Stopped:
            raise
        except KeyboardInterrupt:  # the second one, for the first was remembered
            raise stopped_at_once(signal.SIGINT) from None


def _stop_now(number: int, _: FrameType | None) -> None:
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise Stopped(number)


@contextmanager
def _handling(numbers: tuple[int, ...], handler: Callable[..., Any]) -> Iterator[None]:
    """Install a handler for the while; only the main thread of a program can."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with ExitStack() as stack:
        for number in numbers:
            stack.callback(signal.signal, number, signal.signal(number, handler))
        yield
