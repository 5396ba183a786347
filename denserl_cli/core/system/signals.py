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
"""Exit code 75 of a stage that a scheduler stopped and that has got on: run it again."""
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_FROM_SCHEDULERS = (signal.SIGTERM, signal.SIGUSR1)

_work_is_done = False


class Stopped(KeyboardInterrupt):
    """A scheduler's signal; raised where it finds the program, as Ctrl-C raises its base."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def stoppable(work: str) -> Iterator[None]:
    """Let schedulers' signals end `work` at once, and in order, with `Interrupted`.

    After `ignore_signals_from_now` no signal ends it any more until the outermost context ends.
    """
    global _work_is_done
    nested = signal.getsignal(signal.SIGTERM) is _stop_now
    try:
        with _handling(STOP_SIGNALS, _stop_now):
            yield
    except Stopped as stopped:
        raise stopped_at_once(stopped.number, work) from None
    finally:
        _work_is_done = _work_is_done and nested


def ignore_signals_from_now() -> None:
    """Let no signal end the current work any more: all of it is on record."""
    global _work_is_done
    _work_is_done = True


def ignore_signals() -> None:
    """Ignore the signals that ask to stop for as long as this process lives."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def stopped_at_once(number: int, work: str = "the job") -> Interrupted:
    """What to say when a signal has ended work without a checkpoint.

    Its exit code is 128 + `number`, as of a process that died of the signal: that of Ctrl-C is 130.
    """
    error = Interrupted(
        f"{work} was stopped at once by {signal.Signals(number).name}; what was done since the "
        "last checkpoint, if there is one, is lost",
        hint="go on with --resume",
    )
    error.exit_code, error.signal = 128 + number, number
    return error


def stopped_before_work(number: int) -> Interrupted:
    """What to say when a signal comes while the machines of a job wait for each other."""
    error = Interrupted(
        f"stopped by {signal.Signals(number).name} before all machines of the job had come; "
        "nothing was begun",
        hint="go on with --resume",
    )
    error.exit_code = REQUEUE if number in _FROM_SCHEDULERS else 128 + number
    return error


def set_exit_code(error: Interrupted, progressed: bool) -> None:
    """Give an interruption by a scheduler the exit code 75 where the attempt has got on.

    Without progress it is 128 + the signal's number: whoever requeues on 75 would do so endlessly.
    """
    if error.signal in _FROM_SCHEDULERS:
        error.exit_code = REQUEUE if progressed else 128 + error.signal


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

    with _handling(STOP_SIGNALS, remember):
        try:
            yield lambda: bool(asked)
        except Interrupted as error:
            error.signal = asked[0] if asked else error.signal
            set_exit_code(error, progressed=True)
            raise
        except Stopped:
            raise
        except KeyboardInterrupt:  # the second one, for the first was remembered
            raise stopped_at_once(signal.SIGINT) from None


def _stop_now(number: int, _: FrameType | None) -> None:
    if _work_is_done:
        return
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise Stopped(number)


@contextmanager
def _handling(numbers: tuple[int, ...], handler: Callable[..., Any]) -> Iterator[None]:
    """Install a handler while the block runs; only the main thread of a program can."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with ExitStack() as stack:
        for number in numbers:
            stack.callback(signal.signal, number, signal.signal(number, handler))
        yield
