"""Reads run folders for a report, without the recipe; damaged files are left out with a note."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from numpy.typing import NDArray

from denserl_cli.core.errors import DenserlError
from denserl_cli.core.normalizer import LocationNormalizer
from denserl_cli.core.recipe.stages import TRAIN_PPO, TRAIN_RM
from denserl_cli.core.runs.run_json import RunJson

_ENDLESS = 1e300
"""Larger numbers let sums and the widths of axes overflow."""
Line = dict[str, Any]
"""One logged line: `stage`, `step` and metrics."""


class Series(NamedTuple):
    """A metric over the steps that have it, (points,) each; values are finite."""

    steps: NDArray[np.float64]
    values: NDArray[np.float64]

    @property
    def early(self) -> float:
        """Mean of the first fifth."""
        return float(self.values[: self._fifth].mean())

    @property
    def late(self) -> float:
        """Mean of the last fifth."""
        return float(self.values[-self._fifth :].mean())

    @property
    def _fifth(self) -> int:
        return max(1, len(self.values) // 5)

    def __bool__(self) -> bool:
        return len(self.values) > 0


@dataclass(frozen=True)
class StageRecord:
    """What run.json says of a stage. versions, processes, device: empty in older runs."""

    finished: bool
    settings: Mapping[str, Any] = field(default_factory=dict)
    summary: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    processes: int | None = None
    device: str | None = None


@dataclass(frozen=True)
class RunRecord:
    """Everything that a report needs of one run; what could not be read is empty.

    Attributes:
        label: Its name among the runs of a comparison.
        path: Its folder.
        recipe: Nested.
        stages: By name.
        metrics: Lines by stage, ascending in step.
        samples: Lines of train-ppo.
        normalizer: Of the reward model; None without one.
        measured: What the normaliser was fitted to, rows of location, mean and std.
        accuracy_by_length: Bins of the reward model's latest evaluation.
        notes: What is missing or could not be read.
    """

    label: str
    path: Path
    recipe: Mapping[str, Any] = field(default_factory=dict)
    stages: Mapping[str, StageRecord] = field(default_factory=dict)
    metrics: Mapping[str, Sequence[Line]] = field(default_factory=dict)
    samples: Sequence[Line] = ()
    normalizer: LocationNormalizer | None = None
    measured: Sequence[tuple[float, float, float]] = ()
    accuracy_by_length: Sequence[Mapping[str, Any]] = ()
    notes: Sequence[str] = ()

    def series(self, stage: str, name: str) -> Series:
        """A metric of a stage over the steps that have it as a finite number."""
        points = [(line["step"], line.get(name)) for line in self.metrics.get(stage, ())]
        known = [(step, value) for step, value in points if is_number(value)]
        return Series(*np.array(known, dtype=np.float64).reshape(-1, 2).T)

    def setting(self, name: str) -> Any:
        """A field of the recipe by its dotted name; None if it is missing."""
        found: Any = self.recipe
        for part in name.split("."):
            found = found.get(part) if isinstance(found, Mapping) else None
        return found


def read_runs(folders: Sequence[Path]) -> list[RunRecord]:
    """Read run folders, each with its own label. Raises DenserlError for another folder."""
    for count, folder in enumerate(folders):
        if _real(folder) in map(_real, folders[:count]):
            raise DenserlError(f"{folder} is named twice", hint="name each run once")
    labels = _labels(folders)
    return [read_run(folder, label) for folder, label in zip(folders, labels, strict=True)]


def read_run(folder: Path, label: str) -> RunRecord:
    """Read one run folder. Raises DenserlError for another folder or a damaged run.json."""
    notes = list[str]()
    stages = {name: _stage(entry) for name, entry in _read_run_json(folder).stages.items()}
    lines = _read_lines(folder / "metrics.jsonl", notes) if stages else []
    metrics = {name: _in_order(lines, name) for name in stages}
    samples = _read_lines(folder / "samples.jsonl", notes) if TRAIN_PPO in stages else []
    normalizer = folder / "reward_model" / "normalizer.json"
    return RunRecord(
        label=label,
        path=folder,
        recipe=_read_recipe(folder / "recipe.yaml", notes),
        stages=stages,
        metrics=metrics,
        samples=[one for one in samples if _is_sample(one)],
        normalizer=_read_normalizer(normalizer, notes),
        measured=_measured(_read_json(normalizer)),
        accuracy_by_length=_lengths(metrics.get(TRAIN_RM, ()), folder / "evaluation"),
        notes=notes,
    )


def is_number(value: object) -> bool:
    """Whether a logged value is a number that can be drawn: finite and not close to overflow."""
    return type(value) in (int, float) and abs(value) < _ENDLESS  # type: ignore[arg-type]


def _real(folder: Path) -> Path:
    """The folder without links; unlike `resolve`, circular links raise no error."""
    return Path(os.path.realpath(folder))


def _labels(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that differ between all folders."""
    parts = [_real(folder).parts for folder in folders]
    for depth in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(part[-depth:]) for part in parts]
        if len(set(labels)) == len(labels):
            break
    return labels


def _read_run_json(folder: Path) -> RunJson:
    file = folder / "run.json"
    if not file.is_file():
        what = "is not a denserl run" if folder.is_dir() else "is not a folder"
        raise DenserlError(
            f"{folder} {what}", hint="name a run folder, such as runs/sandbox-segment"
        )
    return RunJson.read(file)


def _stage(entry: Mapping[str, Any]) -> StageRecord:
    def mapping(name: str) -> dict[str, Any]:
        found = entry.get(name)
        return found if isinstance(found, dict) else {}

    processes, device = entry.get("processes"), entry.get("device")
    return StageRecord(
        finished=entry.get("status") == "finished",
        settings=mapping("settings"),
        summary=mapping("summary"),
        versions={str(name): str(version) for name, version in mapping("versions").items()},
        processes=processes if isinstance(processes, int) else None,
        device=device if isinstance(device, str) else None,
    )


def _read_lines(file: Path, notes: list[str]) -> list[Line]:
    """The lines of a log that have a stage and a step; a note says how many others there are."""
    if not file.is_file():
        notes.append(f"{file.name} is missing")
        return []
    found, bad = [], 0
    for text in file.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            line = json.loads(text)
            step = line["step"]
            good = isinstance(line["stage"], str) and type(step) is int and is_number(step)
        except (ValueError, KeyError, TypeError, RecursionError):
            good = False
        if good:
            found.append(line)
        elif text.strip():
            bad += 1
    if bad:
        notes.append(f"{file.name}: {bad} lines could not be read and are left out")
    if not found and not bad:
        notes.append(f"{file.name} is empty")
    return found


def _in_order(lines: Sequence[Line], stage: str) -> list[Line]:
    """A stage's lines, ascending in step; the last line of a step counts."""
    by_step = {line["step"]: line for line in lines if line["stage"] == stage}
    return [by_step[step] for step in sorted(by_step)]


def _is_sample(line: Line) -> bool:
    segments = line.get("segments")
    return (
        line.get("stage") == TRAIN_PPO
        and isinstance(line.get("prompt"), str)
        and isinstance(segments, list)
        and all(isinstance(one, dict) and isinstance(one.get("text"), str) for one in segments)
    )


def _read_recipe(file: Path, notes: list[str]) -> dict[str, Any]:
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        notes.append(f"{file.name} is missing")
        return {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        found = None
    if not isinstance(found, dict):
        notes.append(f"{file.name} could not be read")
        return {}
    return found


def _read_normalizer(file: Path, notes: list[str]) -> LocationNormalizer | None:
    if not file.is_file():
        return None
    try:
        found = LocationNormalizer.load(file)
        if all(map(is_number, astuple(found))):
            return found
    except DenserlError:
        pass
    notes.append(f"{file.name} could not be read")
    return None


def _measured(content: Mapping[str, Any]) -> list[tuple[float, float, float]]:
    record = content.get("record")
    table = record.get("table") if isinstance(record, dict) else None
    rows = [row for row in table if isinstance(row, dict)] if isinstance(table, list) else []
    points: list[Any] = [(row.get("location"), row.get("mean"), row.get("std")) for row in rows]
    return [point for point in points if all(map(is_number, point))]


def _lengths(lines: Sequence[Line], folder: Path) -> list[dict[str, Any]]:
    """Accuracy by length difference, from train-rm's last evaluation or else `evaluate rm`."""
    candidates = [line.get("eval_lengths") for line in reversed(lines)]
    candidates += [
        content["length"].get("bins")
        for content in map(_read_json, sorted(folder.glob("rm-*.json")))
        if isinstance(content.get("length"), dict)
    ]
    return next((bins for bins in candidates if bins and _are_bins(bins)), [])


def _are_bins(bins: object) -> bool:
    return isinstance(bins, list) and all(
        isinstance(one, dict)
        and is_number(one.get("pairs"))
        and is_number(one.get("accuracy"))
        and all(one.get(name) is None or is_number(one[name]) for name in ("shortest", "longest"))
        for one in bins
    )


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
