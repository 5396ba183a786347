"""Findings: warnings about a run, each with what to try."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from denserl_cli.core.reporting.record import RunRecord

Severity = Literal["serious", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("serious", "warning", "note")
POINTS = 5
"""Fewer steps are too few for a trend."""


@dataclass(frozen=True)
class Finding:
    """A warning from a run's metrics, and what to try."""

    severity: Severity
    what: str
    advice: str


Check = Callable[[RunRecord], Iterator[Finding]]
