"""Why a row cannot be used."""

from __future__ import annotations

TIE = "tie"
"""The reason for which a row whose answers are equally good gives no pair."""


class UnusableRow(Exception):
    """A row cannot be used: a reason to count by, and what is particular to this row.

    The detail names the column, what was found there and what is wanted.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.detail = detail


def shown(value: object, limit: int = 40) -> str:
    """A value as an error message shows it: short, in one line."""
    text = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
