"""A terminal for tests that look at one."""

import io
import re
import sys

import pytest


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def open_terminal(
    monkeypatch: pytest.MonkeyPatch, stream: str = "stderr", width: int = 80, height: int = 25
) -> Terminal:
    """A terminal as stderr (pytest sets its own once the test begins)."""
    terminal = Terminal()
    monkeypatch.setattr(sys, stream, terminal)
    for name, value in (("TERM", "xterm-256color"), ("COLUMNS", width), ("LINES", height)):
        monkeypatch.setenv(name, str(value))
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLORTERM", "CI"):
        monkeypatch.delenv(name, raising=False)
    return terminal


def without_codes(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
