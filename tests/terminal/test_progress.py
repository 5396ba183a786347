import re

import pytest

from denserl_cli.terminal import progress


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress.time, "monotonic", clock)
    return clock


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (61.4, "1:01"), (3600, "1:00:00"), (-3, "0:00")]
)
def test_durations(seconds: float, text: str):
    assert progress.clock(seconds) == text


def test_pace_counts_only_what_was_done_now(clock):
    pace = progress.Progress("train", total=100, done=40)
    assert (pace.count, pace.rate, pace.left) == ("40/100", "", "")
    clock.now += 10
    pace.advance(20, {"loss": 0.5})
    pace.advance(0, {"kl": 2.0})
    assert (pace.count, pace.rate, pace.left) == ("60/100", "2.0/s", "0:20 left")
    assert pace.latest == "loss 0.5  kl 2"
    slow = progress.Progress("generate", total=None, done=0)
    clock.now += 30
    slow.advance(2, {})
    assert (slow.count, slow.rate, slow.left) == ("2", "15.0 s each", "")


def test_plain_lines_are_first_last_and_some_between(clock, capsys):
    observer = progress.PlainObserver()
    observer.begin("train-rm", total=20)
    for step in range(20):
        clock.now += 1
        observer.advance(loss=step / 10)
    observer.notice("best [so far]")
    observer.end()
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert all(re.match(r"\d\d:\d\d:\d\d  ", line) for line in lines)
    assert [line[10:] for line in lines] == [
        "train-rm  0/20",
        "train-rm  5/20  1.0/s  0:15 left  loss 0.4",
        "train-rm  10/20  1.0/s  0:10 left  loss 0.9",
        "train-rm  15/20  1.0/s  0:05 left  loss 1.4",
        "train-rm  20/20  1.0/s  0:00 left  loss 1.9",
        "note: best [so far]",
        "train-rm  20/20  took 0:20  1.0/s  loss 1.9",
    ]


def test_pieces_of_work_nest_and_all_end_with_the_context(capsys):
    with progress.PlainObserver() as observer:
        observer.begin("outer", total=2)
        observer.begin("inner", total=1)
        observer.advance()
        observer.end()
        observer.advance()
        observer.begin("inner", total=1)
    lines = [line[10:] for line in capsys.readouterr().err.splitlines()]
    assert [" ".join(line.split()[:2]) for line in lines] == [
        "outer 0/2",
        "outer 1/2",
    ]
