"""Segments on a terminal of 80 and of 200 columns, without colour, in a pipe."""

from __future__ import annotations

import io
import re
import sys

import pytest

from denserl_cli.core.inspection.traces import Segment, SegmentedResponse
from denserl_cli.terminal import segments as segment_view


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def response(side: str, rewards: list[float | None], text: str = "one two") -> SegmentedResponse:
    segments = [
        Segment(f" {text} {k}", 3 * k, 3 * k + 2, 1.5 + k, reward, reward, reward)
        for k, reward in enumerate(rewards)
    ]
    score = None if rewards[0] is None else 0.25
    return SegmentedResponse(f"pairs:1 {side}", side, "the question", True, segments, score)


PAIR = [response("chosen", [-2.0, -1.0, 0.0, 1.0, 2.0]), response("rejected", [0.2, -0.7])]


def shown(monkeypatch, columns: int | None, **environment: str) -> str:
    """What stands on a terminal of so many columns, or in a pipe."""
    stream = io.StringIO() if columns is None else Terminal()
    monkeypatch.setattr(sys, "stdout", stream)
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)
    environment = {"TERM": "xterm-256color", "COLUMNS": str(columns or 40), **environment}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    segment_view.print_segments(PAIR, True)
    return stream.getvalue()


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def test_a_narrow_terminal_has_one_below_the_other(monkeypatch):
    text = plain(shown(monkeypatch, 80))
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    assert text.index("pairs:1 chosen") < text.index("one two 4") < text.index("pairs:1 rejected")
    assert text.count("the question") == 1


def test_a_wide_terminal_has_them_side_by_side(monkeypatch):
    lines = plain(shown(monkeypatch, 200)).splitlines()
    assert max(map(len, lines)) <= 200
    assert any("pairs:1 chosen" in line and "pairs:1 rejected" in line for line in lines)


@pytest.mark.parametrize("columns", [80, 200])
def test_marks_say_what_colours_say(columns: int, monkeypatch):
    coloured = shown(monkeypatch, columns)
    without = shown(monkeypatch, columns, NO_COLOR="1")
    assert "\x1b[38;" in coloured and not re.search(r"\x1b\[[0-9;]*[34]8;", without)
    assert plain(coloured) == plain(without)
    text = " ".join(plain(without).split())
    for mark in ("one two 0⁻⁻▲", "1⁻▲", "2·▲", "3⁺▲", "4⁺⁺ "):
        assert mark in text


def test_a_pipe_gets_whole_lines_without_codes(monkeypatch):
    text = shown(monkeypatch, None)
    assert "\x1b" not in text and "…" not in text
    assert " one two 0⁻⁻▲ one two 1⁻▲ one two 2·▲ one two 3⁺▲ one two 4⁺⁺\n" in text
    assert re.search(r"#\s+tokens\s+entropy\s+raw\s+reward\s+per token\s+text", text)


def test_without_rewards_there_are_no_columns_and_marks_for_them(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    segment_view.print_segments([response("", [None, None])], False)
    assert " one two 0│ one two 1\n" in stream.getvalue()
    assert "reward" not in stream.getvalue()


def test_control_characters_cannot_rule_the_terminal(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    segment_view.print_segments([response("", [1.0], "\x1b[31mred\x07\nline")], True)
    assert "\x1b" not in stream.getvalue() and "\\x1b[31mred\\x07\nline" in stream.getvalue()
    assert "red\\x07↵line" in stream.getvalue()
