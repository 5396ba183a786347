import signal
import threading

import pytest

from denserl_cli.core.stopping import stop_requested


@pytest.fixture(autouse=True)
def _pythons_own_handler():
    """A shell starts background jobs with Ctrl-C ignored; the tests are about the usual case."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_is_remembered_and_a_second_one_interrupts():
    with stop_requested() as stopping:
        assert not stopping()
        signal.raise_signal(signal.SIGINT)
        assert stopping() and stopping()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


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


def test_in_another_thread_nothing_is_ever_requested():
    seen: list[bool] = []

    def work() -> None:
        with stop_requested() as stopping:
            seen.append(stopping())

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False] and signal.getsignal(signal.SIGINT) is before
