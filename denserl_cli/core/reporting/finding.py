"""What a report has to say about a run, and what to try."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from denserl_cli.core.reporting.record import RunRecord

Severity = Literal["serious", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("serious", "warning", "note")
POINTS = 5
"""Steps below which nothing is said about a trend."""


@dataclass(frozen=True)
class Finding:
    """Something that a run's figures say, and what to try."""

    severity: Severity
    what: str
    advice: str


Check = Callable[[RunRecord], Iterator[Finding]]
