import io
import math
import sys
from typing import Any

import pytest
from rich.console import Console, Group
from rich.segment import Segment

from denserl_cli.terminal.dashboard import (
    CURVES,
    Display,
    LiveCurves,
    TerminalObserver,
    make_observer,
)
from denserl_cli.terminal.progress import PlainObserver, Progress
from tests.pretend_terminal import open_terminal, without_codes

TEXTS = ["Hello", ", 世界! " * 9, "\x1b[2J\n\n", " 👩‍🚀 مرحبا", "long" * 60]


def sample(count: int = len(TEXTS), **more: Any) -> dict[str, Any]:
    segments = [
        {"text": text, "tokens": 1, "value": 0.0, "reward": place - 1.5}
        for place, text in enumerate(TEXTS[:count])
    ]
    return {"prompt": "say\nsomething " * 30, "segments": segments, **more}


def full_board(steps: int = 300) -> LiveCurves:
    board = LiveCurves()
    for step in range(steps):
        speeds = {"tokens_per_second": 12345.6, "responses_per_second": 9.87}
        phases = {"rollout_seconds": 1.5, "scoring_seconds": 0.04, "update_seconds": 123.4}
        board.add({name: step * 1e5 for name in CURVES} | speeds | phases)
    for _ in range(4):
        board.add_sample(steps, sample())
    return board


def display(board: LiveCurves, width: int, height: int, bars: int = 2) -> Display:
    """A display that nobody refreshes."""
    console = Console(width=width, height=height, force_terminal=True, file=io.StringIO())
    shown = Display(board, console)
    for depth in range(bars):
        pace = Progress("", total=4000, done=40 * depth)
        shown.add_task("  " * depth + "train [the] policy", total=4000, pace=pace)
    return shown


def screen(shown: Display) -> list[str]:
    lines = shown.console.render_lines(Group(*shown.get_renderables()), pad=False)
    return ["".join(part.text for part in line if not part.control).rstrip() for line in lines]


def frame(board: LiveCurves, width: int, height: int, bars: int = 2) -> list[str]:
    return screen(display(board, width, height, bars))


@pytest.mark.parametrize(
    ("width", "height"), [(80, 24), (200, 50), (120, 30), (50, 14), (30, 8), (20, 4), (80, 2)]
)
def test_a_frame_fits_every_terminal(width: int, height: int):
    shown = display(full_board(), width, height, bars=3)
    lines = shown.console.render_lines(Group(*shown.get_renderables()), pad=False)
    assert 0 < len(lines) < height
    assert all(Segment.get_line_length(line) <= width for line in lines)
    assert "train" in screen(shown)[0]


def test_80_columns():
    board = LiveCurves()
    for step in range(1, 5):
        board.add({"kl": step / 2, "loss": math.nan if step == 2 else 1 / step, "learning_rate": 1})
    board.add({"kl": 2500.0, "loss": None, "tokens_per_second": 4321.9})
    board.add_sample(5, sample(1) | {"prompt": "say hi"})
    bar, speed, loss, kl, *shown = frame(board, 80, 24, bars=1)
    assert bar.startswith("train [the] policy ━") and "0/4000" in bar
    assert speed == "4,322 tokens/s"
    assert loss.split() == ["loss", "█×▂▁×", "nan", "(0.25", "…", "1)"]
    assert kl.split() == ["kl", "▁▁▁▁█", "2,500", "(0.5", "…", "2,500)"]
    assert shown == ["sample of step 5", "say hi", "Hello[-1.50]"]


def test_reward_functions_have_curves():
    board, names = LiveCurves(), lambda: [text.plain.split()[0] for text in board.curves(80)]
    board.add({"eval_reward_brevity": 2.0, "eval_kl": 0.5})
    board.add({"reward_brevity": 2.0, "dense_reward": 1.0, "kl": 0.5})
    assert names() == ["reward_brevity", "dense_reward", "eval_reward_brevity", "kl"]
    board = LiveCurves()
    board.add({"reward_mean": 1.0, "reward_std": 2.0, "loss": 0.5})  # of train-rm
    assert names() == ["loss"]
    board.add({"rm_score": 1.0, "dense_reward": 1.0, "kl": 0.5})
    assert names() == ["loss", "rm_score", "kl"]


def test_samples_go_first_where_lines_are_scarce_and_curves_after_them():
    texts = {height: "\n".join(frame(full_board(), 80, height)) for height in (50, 24, 18, 10, 4)}
    assert [text.count("sample of step 300") for text in texts.values()] == [4, 1, 0, 0, 0]
    counts = [sum(name in text for name in CURVES) for text in texts.values()]
    assert counts == sorted(counts, reverse=True) and counts[2] == len(CURVES) > counts[3]
    assert CURVES[0] in texts[10] and all("train [the] policy" in text for text in texts.values())
    assert frame(full_board(), 80, 22)[-1] == "…"


def test_two_curves_stand_side_by_side_on_a_wide_terminal():
    lines = frame(full_board(), 200, 50)
    assert any(CURVES[0] in line and CURVES[1] in line for line in lines)
    assert len(lines) < len(frame(full_board(), 80, 50))


def test_samples_tell_what_they_are():
    board = LiveCurves()
    board.add_sample(1, sample(1, label="chosen", score=0.25))
    board.add_sample(2, sample(1, label="rejected", score=-0.5))
    board.add_sample(2, sample(1, held_out=True))
    text = "\n".join(frame(board, 80, 24))
    assert "step 1" not in text and "chosen" not in text
    assert "sample of step 2: rejected, score -0.5" in text
    assert "sample of step 2: held out" in text
    board.add_sample(3, sample(1, score=None))  # metrics have no NaN
    assert "score nan" in "\n".join(frame(board, 80, 24))


def test_a_narrower_terminal_has_folded_lines_to_clear():
    shown = display(full_board(), 160, 30)
    wide = [len(line) for line in screen(shown)]
    shown.console.size = (80, 30)  # type: ignore[assignment]
    screen(shown)
    written = shown.console.file.getvalue()  # type: ignore[attr-defined]
    assert written.count("\x1b[1A") == sum(math.ceil(length / 80) - 1 for length in wide if length)
    screen(shown)
    assert shown.console.file.getvalue() == written  # type: ignore[attr-defined]


def test_the_live_display_shows_progress_notices_and_tables(monkeypatch, capsys):
    terminal = open_terminal(monkeypatch)
    with TerminalObserver() as observer:
        observer.begin("train [the] model", total=4, done=1)
        observer.advance(loss=0.25)
        observer.notice("resuming [bold]here[/bold]")
        observer.begin("evaluate")
        observer.advance(3)
        observer.end()
        observer.table("Result", ("metric", "value"), [("accuracy", 0.75)])
        observer.advance(2, loss=0.125)
    text = without_codes(terminal.getvalue())
    assert "note: resuming [bold]here[/bold]" in text
    last = [line for line in text.splitlines() if "train [the] model" in line][-1]
    assert "4/4" in last and text.rstrip().endswith("loss 0.125")
    assert "accuracy" not in text
    assert "accuracy" in capsys.readouterr().out


def test_an_error_leaves_the_last_frame_without_samples_and_a_clean_terminal(monkeypatch):
    terminal = open_terminal(monkeypatch)
    with pytest.raises(KeyboardInterrupt), TerminalObserver() as observer:
        observer.begin("train", total=4)
        observer.metrics(1, {"loss": 0.5})
        observer.sample(1, sample())
        observer.begin("evaluate", total=9)
        raise KeyboardInterrupt
    text = terminal.getvalue()
    assert sys.stderr is terminal
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")
    last = without_codes(text[text.rindex("\x1b[2K") :])
    assert [line.split()[0] for line in last.splitlines() if line.strip()] == ["train", "loss"]


def test_the_next_work_starts_with_an_empty_board(monkeypatch):
    terminal = open_terminal(monkeypatch)
    with TerminalObserver() as observer:
        observer.metrics(1, {"loss": 0.5})  # of an earlier attempt, before the work begins
        observer.begin("train", total=4)
        observer.end()
        first = terminal.getvalue()
        observer.begin("fit", total=4)
        observer.end()
    assert "loss" in first and "loss" not in terminal.getvalue()[len(first) :]


@pytest.mark.parametrize("colour", [True, False])
def test_no_color(monkeypatch, colour: bool):
    terminal = open_terminal(monkeypatch)
    monkeypatch.setenv("COLORTERM", "truecolor")
    if not colour:
        monkeypatch.setenv("NO_COLOR", "1")
    with TerminalObserver() as observer:
        observer.metrics(1, {"loss": 0.5})
        observer.sample(1, sample())
        observer.begin("train", total=4)
        observer.notice("said")
    assert ("\x1b[36m" in terminal.getvalue()) == colour
    assert ("48;2;" in terminal.getvalue()) == colour
    assert "[+0.50]" in terminal.getvalue()


@pytest.mark.parametrize(
    ("variables", "live"),
    [
        ({}, True),
        ({"NO_COLOR": "1"}, True),
        ({"TERM": "dumb"}, False),
        ({"CI": "true"}, False),
        ({"TTY_INTERACTIVE": "0"}, False),
    ],
)
def test_the_observer_follows_the_terminal(monkeypatch, variables: dict[str, str], live: bool):
    open_terminal(monkeypatch)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert isinstance(make_observer(), TerminalObserver if live else PlainObserver)


def test_a_pipe_gets_lines_whatever_the_environment_says(monkeypatch):
    open_terminal(monkeypatch)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert isinstance(make_observer(), PlainObserver)
