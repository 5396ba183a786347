"""How far a run is and whether a job works on it, from the files of its folder alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from denserl_cli.core.errors import DenserlError
from denserl_cli.core.recipe.stages import TRAIN_RM, TRAINING
from denserl_cli.core.runs.run_json import RunJson
from denserl_cli.core.system.lock import Holder, holder

_RECENT = 10
"""Steps whose mean duration tells the time that is left."""
_NUMBERS = 1e300


@dataclass(frozen=True)
class StageStatus:
    """How far a stage is.

    Attributes:
        state: `not started`, `running`, `interrupted` or `finished`; `interrupted or running` where
            the file system does not tell whether a job holds the lock.
        step: The last step whose metrics are there; None for a stage without any.
        steps: Of the whole stage; None where that is not on record.
        seconds_left: At the pace of the last steps, without evaluations; None where not known.
        metrics: Numbers of the last step.
        checkpoints: Steps to go on from.
        exit_code: Of the last attempt; None while it runs, and where it was killed.
    """

    state: str
    step: int | None = None
    steps: int | None = None
    seconds_left: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    checkpoints: tuple[int, ...] = ()
    exit_code: int | None = None


@dataclass(frozen=True)
class RunStatus:
    """A run. job: the living one that holds the lock, if any."""

    run: str
    recipe: str
    job: Holder | None
    stages: Mapping[str, StageStatus]


def read_status(folder: Path) -> RunStatus:
    """Read the status of a run.

    Raises:
        DenserlError: the folder is no run, or its run.json is damaged.
    """
    file = folder / "run.json"
    if not file.is_file():
        what = "is not a denserl run" if folder.is_dir() else "is no folder"
        raise DenserlError(
            f"{folder} {what}", hint="name a run folder, such as runs/sandbox-segment"
        )
    content, lines = RunJson.read(file), _last_lines(folder / "metrics.jsonl")
    job, known = holder(folder / "lock")
    entries = content.stages
    open_stages = [
        name for name in TRAINING if entries.get(name, {}).get("status") == "interrupted"
    ]
    current = open_stages[-1] if open_stages else None
    stages: dict[str, StageStatus] = {}
    for name in TRAINING:
        state = "not started"
        if name in entries:
            state = entries[name]["status"]
        if name == current and "exit_code" not in entries[name]:
            state = "running" if job else state if known else "interrupted or running"
        stages[name] = _stage(name, folder, entries.get(name, {}), state, lines.get(name, []))
    return RunStatus(str(folder), content.recipe, job, stages)


def _stage(
    name: str, folder: Path, entry: Mapping[str, Any], state: str, lines: list[dict[str, Any]]
) -> StageStatus:
    steps = entry.get("steps") if isinstance(entry.get("steps"), int) else None
    last = lines[-1] if lines else {}
    step, code = last.get("step"), entry.get("exit_code")
    left = None
    if steps is not None and step is not None and state != "finished":
        pace = _seconds_a_step(name, entry, lines)
        left = None if pace is None else pace * max(0, steps - step)
    return StageStatus(
        state,
        step,
        steps,
        left,
        {key: value for key, value in last.items() if key != "step" and _is_number(value)},
        _checkpoints(folder / "checkpoints" / name),
        code if isinstance(code, int) else None,
    )


def _seconds_a_step(
    name: str, entry: Mapping[str, Any], lines: list[dict[str, Any]]
) -> float | None:
    """Mean duration of the last steps, from the responses that each has worked on."""
    pairs = entry["settings"].get("reward_model.batch_size")
    usual = 2 * pairs if name == TRAIN_RM and _is_number(pairs) else None
    seconds = []
    for line in lines:
        responses, pace = line.get("responses", usual), line.get("responses_per_second")
        if _is_number(responses) and _is_number(pace) and pace > 0:
            seconds.append(responses / pace)
    return sum(seconds) / len(seconds) if seconds else None


def _last_lines(file: Path) -> dict[str, list[dict[str, Any]]]:
    """The last lines of each stage, ascending in step."""
    found: dict[str, list[dict[str, Any]]] = {}
    if not file.is_file():
        return found
    with file.open(encoding="utf-8", errors="replace") as text:
        for row in text:
            try:
                line = json.loads(row)
                if isinstance(line["stage"], str) and type(line["step"]) is int:
                    of = found.setdefault(line["stage"], [])
                    of.append(line)
                    del of[:-_RECENT]
            except (ValueError, KeyError, TypeError, RecursionError):
                continue  # a line torn by a kill
    return found


def _checkpoints(folder: Path) -> tuple[int, ...]:
    names = [one.name.removeprefix("step-") for one in folder.glob("step-*")]
    return tuple(sorted(int(name) for name in names if name.isdecimal()))


def _is_number(value: object) -> TypeGuard[float]:
    return type(value) in (int, float) and abs(value) < _NUMBERS  # type: ignore[arg-type]
