"""Stand-ins that several tests share."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from typing import Any

from denserl_cli.core.observer import Observer


class RecordingObserver(Observer):
    """Keeps what it is told, and calls `at_step` with the number of training steps done."""

    def __init__(self, at_step: Callable[[int], None] = lambda done: None) -> None:
        self.notices: list[str] = []
        self.titles: list[str] = []
        self.tables: list[str] = []
        self.at_step = at_step
        self._work: list[tuple[str, int]] = []

    def begin(self, title: str, total: int | None = None, done: int = 0) -> None:
        self.titles.append(title)
        self._work.append((title, done))

    def advance(self, count: int = 1, /, **metrics: float) -> None:
        title, done = self._work.pop()
        self._work.append((title, done + count))
        if title == "train the reward model":
            self.at_step(done + count)

    def end(self) -> None:
        self._work.pop()

    def notice(self, message: str) -> None:
        self.notices.append(message)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        self.tables += [title, *(" ".join(map(str, row)) for row in rows)]


class InterruptingObserver(Observer):
    """Presses Ctrl-C when a piece of work has advanced so far; any piece without a title."""

    def __init__(self, after: int, title: str | None = None) -> None:
        self._left, self._title = after, title
        self._titles: list[str] = []

    def begin(self, title: str, total: int | None = None, done: int = 0) -> None:
        self._titles.append(title)

    def end(self) -> None:
        self._titles.pop()

    def advance(self, count: int = 1, /, **metrics: float) -> None:
        if count and self._left > 0 and self._title in (None, self._titles[-1]):
            self._left -= count
            if self._left <= 0:
                os.kill(os.getpid(), signal.SIGINT)


def user(content: Any) -> dict[str, Any]:
    """A user's message."""
    return {"role": "user", "content": content}


def bot(content: Any) -> dict[str, Any]:
    """The assistant's message."""
    return {"role": "assistant", "content": content}
