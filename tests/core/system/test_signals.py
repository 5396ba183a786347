import signal
import threading
from collections.abc import Iterator

import pytest

from denserl_cli.core.errors import Interrupted
from denserl_cli.core.system.signals import (
    STOP_SIGNALS,
    ignore_signals_from_now,
    set_exit_code,
    stop_requested,
    stoppable,
    stopped_at_once,
)

SCHEDULERS = [signal.SIGTERM, signal.SIGUSR1]


@pytest.fixture(autouse=True)
def _pythons_own_handler() -> Iterator[None]:
    """A shell starts background jobs with Ctrl-C ignored; the tests are about the usual case."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def handlers() -> list[object]:
    return [signal.getsignal(number) for number in (signal.SIGINT, *SCHEDULERS)]


@pytest.mark.parametrize("number", [signal.SIGINT, *SCHEDULERS])
def test_a_signal_is_remembered_and_ctrl_c_then_interrupts(number: signal.Signals):
    before = handlers()
    with stop_requested() as stopping:
        assert not stopping()
        signal.raise_signal(number)
        assert stopping() and stopping()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert handlers() == before


@pytest.mark.parametrize("number", SCHEDULERS)
def test_a_schedulers_signal_may_come_twice(number: signal.Signals):
    """A scheduler may signal every process of a job, and the launcher hands its own on."""
    with stop_requested() as stopping:
        signal.raise_signal(number)
        signal.raise_signal(number)
        assert stopping()


def test_outside_ctrl_c_interrupts_at_once():
    with pytest.raises(ValueError), stop_requested():
        raise ValueError
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_each_use_starts_anew():
    with stop_requested() as stopping:
        signal.raise_signal(signal.SIGINT)
    with stop_requested() as stopping:
        assert not stopping()


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGUSR1, 75)]
)
def test_the_exit_code_tells_people_from_schedulers(number: signal.Signals, code: int):
    with pytest.raises(Interrupted) as caught, stop_requested():
        signal.raise_signal(number)
        raise Interrupted("stopped after step 3")
    assert caught.value.exit_code == code
    assert Interrupted("another").exit_code == 130


@pytest.mark.parametrize("number", SCHEDULERS)
def test_outside_the_steps_a_scheduler_stops_the_work_at_once(number: signal.Signals):
    before, after = handlers(), []
    with pytest.raises(Interrupted) as caught, stoppable("train-rm in runs/x"):
        signal.raise_signal(number)
        after.append("not reached")
    assert not after and handlers() == before
    assert caught.value.exit_code == 128 + number
    assert f"train-rm in runs/x was stopped at once by {number.name}" in caught.value.message
    assert caught.value.hint and "--resume" in caught.value.hint


@pytest.mark.parametrize(
    ("first", "second", "code"),
    [(signal.SIGUSR1, signal.SIGTERM, 143), (signal.SIGINT, signal.SIGINT, 130)],
)
def test_the_second_signal_stops_the_steps_at_once(
    first: signal.Signals, second: signal.Signals, code: int
):
    with pytest.raises(Interrupted, match=f"at once by {second.name}") as caught, stoppable("work"):
        with stop_requested() as stopping:
            signal.raise_signal(first)
            assert stopping()
            signal.raise_signal(second)
    assert caught.value.exit_code == code and "--resume" in caught.value.hint


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_after_the_work_is_ignored(number: signal.Signals):
    with stoppable("work"):
        with stoppable("its inner part"):
            ignore_signals_from_now()
            signal.raise_signal(number)
        signal.raise_signal(number)
    with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else Interrupted):
        with stoppable("the next work"):
            signal.raise_signal(number)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 138)])
def test_only_progress_is_requeued(number: signal.Signals, code: int):
    error = stopped_at_once(number)
    for progressed, expected in ((False, code), (True, 75), (False, code)):
        set_exit_code(error, progressed)
        assert error.exit_code == expected
    by_hand = stopped_at_once(signal.SIGINT)
    set_exit_code(by_hand, progressed=True)
    assert by_hand.exit_code == 130


def test_ctrl_c_outside_the_steps_stays_what_it_is():
    with pytest.raises(KeyboardInterrupt), stoppable("work"):
        signal.raise_signal(signal.SIGINT)


def test_a_librarys_except_exception_does_not_swallow_the_signal():
    with pytest.raises(Interrupted), stoppable("work"):
        try:
            signal.raise_signal(signal.SIGTERM)
        except Exception:
            pytest.fail("swallowed")


def test_in_another_thread_nothing_is_ever_requested():
    seen: list[bool] = []

    def work() -> None:
        with stoppable("work"), stop_requested() as stopping:
            seen.append(stopping())

    before = handlers()
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False] and handlers() == before
