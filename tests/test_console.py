import io
import re
import sys

import pytest

from denserl_cli import console
from denserl_cli.core.errors import DenserlError, Interrupted, RecipeError


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(console.time, "monotonic", clock)
    return clock


def open_terminal(monkeypatch: pytest.MonkeyPatch, stream: str = "stderr") -> Terminal:
    """A terminal of 80 columns as stderr (pytest sets its own once the test begins)."""
    terminal = Terminal()
    monkeypatch.setattr(sys, stream, terminal)
    for name, value in (("TERM", "xterm-256color"), ("COLUMNS", "80"), ("LINES", "25")):
        monkeypatch.setenv(name, value)
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)
    return terminal


def without_codes(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def test_a_piped_error_is_plain_unfolded_text(capsys):
    console.print_error(DenserlError("no [bold]such[/] thing " + "x" * 200, hint="make one"))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == f"error: no [bold]such[/] thing {'x' * 200}\nhint: make one\n"


def test_several_problems_start_their_own_lines(capsys):
    console.print_error(RecipeError(["r.yaml:1: a", "r.yaml:2: b"]))
    assert capsys.readouterr().err == "error:\nr.yaml:1: a\nr.yaml:2: b\n"
    console.print_error(Interrupted("saved", hint="--resume"))
    assert capsys.readouterr().err == "interrupted: saved\nhint: --resume\n"


def test_an_error_on_a_terminal_is_framed(monkeypatch):
    terminal = open_terminal(monkeypatch)
    console.print_error(DenserlError("data.prompts[0] [red]is[/red] missing", hint="name one"))
    text = without_codes(terminal.getvalue())
    assert "╭─ Error" in text and "data.prompts[0] [red]is[/red] missing" in text
    assert "name one" in text
    assert "\x1b[31m" in terminal.getvalue()


def test_no_color_takes_the_colours_away(monkeypatch):
    terminal = open_terminal(monkeypatch)
    monkeypatch.setenv("NO_COLOR", "1")
    console.print_error(DenserlError("missing"))
    assert "Error" in terminal.getvalue()
    assert "\x1b[31m" not in terminal.getvalue()


def test_a_piped_table_is_whole_and_plain(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    long = "[x] " + "word " * 40
    console.print_table("Fit", ("name", "value"), [(long, 0.123456), ("n", 3.0)])
    out = capsys.readouterr().out
    assert "\x1b" not in out and "…" not in out
    assert long.strip() in out
    lines = [line.rstrip() for line in out.splitlines()]
    assert next(line for line in lines if "[x]" in line).endswith("0.1235")
    assert next(line for line in lines if line.startswith("  n ")).endswith("     3")


def test_a_table_on_a_narrow_terminal_folds(monkeypatch):
    terminal = open_terminal(monkeypatch, "stdout")
    console.print_table("", ("a", "b"), [("x" * 100, None)])
    text = without_codes(terminal.getvalue())
    assert text.count("x") == 100 and "-" in text
    assert max(len(line) for line in text.splitlines()) <= 80


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (61.4, "1:01"), (3600, "1:00:00"), (-3, "0:00")]
)
def test_durations(seconds: float, text: str):
    assert console.clock(seconds) == text


def test_pace_counts_only_what_was_done_now(clock):
    pace = console.Pace("train", total=100, done=40)
    assert (pace.count, pace.rate, pace.left) == ("40/100", "", "")
    clock.now += 10
    pace.advance(20, {"loss": 0.5})
    pace.advance(0, {"kl": 2.0})
    assert (pace.count, pace.rate, pace.left) == ("60/100", "2.0/s", "0:20 left")
    assert pace.latest == "loss 0.5  kl 2"
    slow = console.Pace("generate", total=None, done=0)
    clock.now += 30
    slow.advance(2, {})
    assert (slow.count, slow.rate, slow.left) == ("2", "15.0 s each", "")


def test_plain_lines_are_first_last_and_some_between(clock, capsys):
    observer = console.PlainObserver()
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
    with console.PlainObserver() as observer:
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


def test_the_live_display_shows_progress_notices_and_tables(monkeypatch, capsys):
    terminal = open_terminal(monkeypatch)
    with console.TerminalObserver() as observer:
        observer.begin("train [the] model", total=4, done=1)
        observer.advance(loss=0.25)
        observer.notice("resuming [bold]here[/bold]")
        observer.begin("evaluate")
        observer.advance(3)
        observer.end()
        observer.table("Result", ("figure", "value"), [("accuracy", 0.75)])
        observer.advance(2, loss=0.125)
    text = without_codes(terminal.getvalue())
    assert "note: resuming [bold]here[/bold]" in text
    last = [line for line in text.splitlines() if "train [the] model" in line][-1]
    assert "4/4" in last and text.rstrip().endswith("loss 0.125")
    assert "accuracy" not in text
    assert "accuracy" in capsys.readouterr().out


def test_the_observer_follows_the_stream(monkeypatch):
    open_terminal(monkeypatch)
    assert isinstance(console.make_observer(), console.TerminalObserver)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert isinstance(console.make_observer(), console.PlainObserver)
