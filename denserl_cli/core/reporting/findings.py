"""All findings of a run."""

from __future__ import annotations

from collections.abc import Iterator

from denserl_cli.core.reporting import policy_findings, reward_model_findings
from denserl_cli.core.reporting.finding import SEVERITIES, Check, Finding
from denserl_cli.core.reporting.record import RunRecord


def findings(record: RunRecord) -> list[Finding]:
    """All findings of a run, the serious ones first."""
    found = [finding for check in CHECKS for finding in check(record)]
    return sorted(found, key=lambda one: SEVERITIES.index(one.severity))


def unfinished(record: RunRecord) -> Iterator[Finding]:
    """Stages that were started and are not finished."""
    for name, stage in record.stages.items():
        if not stage.finished:
            steps = [line["step"] for line in record.metrics.get(name, ())]
            reached = f" after step {steps[-1]}" if steps else ""
            yield Finding(
                "note",
                f"Stage {name} is not finished: it was interrupted{reached}, or is still running.",
                "if it is not running, give the same command with --resume.",
            )


def skipped_updates(record: RunRecord) -> Iterator[Finding]:
    """Updates that were skipped because their numbers were not finite."""
    for stage in record.stages:
        skipped = record.series(stage, "skipped_updates")
        if skipped and skipped.values[-1] > 0:
            yield Finding(
                "warning",
                f"Stage {stage} skipped {skipped.values[-1]:.0f} updates: their numbers were not "
                "finite.",
                "lower the learning rate, and look at the batches: run.nonfinite=stop keeps them.",
            )


CHECKS: tuple[Check, ...] = (
    *reward_model_findings.CHECKS,
    *policy_findings.CHECKS,
    skipped_updates,
    unfinished,
)
