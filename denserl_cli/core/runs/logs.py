"""The logs of a run, metrics.jsonl and samples.jsonl, and who is told of each line."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from denserl_cli.core.observer import Observer
from denserl_cli.core.recipe.stages import STAGES
from denserl_cli.core.runs.trackers import Trackers
from denserl_cli.core.system.files import full_disk_named, sync, write_text

if TYPE_CHECKING:
    from denserl_cli.core.recipe import Recipe

LOGS = ("metrics.jsonl", "samples.jsonl")
"""One JSON object a line, each with `stage` and `step`."""


class Logs:
    """The logs in a run folder. The observer is told every line, the trackers every number."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._observer = Observer()
        self._trackers: Trackers | None = None

    def follow(self, recipe: Recipe, stage: str, resumed: int | None, observer: Observer) -> None:
        """Open the trackers of a stage and tell the observer from now on.

        Args:
            recipe: names the trackers.
            stage: its name.
            resumed: the step of the checkpoint that is resumed; None at a start.
            observer: who is told.

        Raises:
            DenserlError: a tracker is not installed or refuses.
        """
        self._observer = observer
        if STAGES[stage].trains:
            logged = self.last_step(stage)
            self._trackers = Trackers(recipe, self._folder, stage, resumed, logged, observer.notice)

    def replay(self, stage: str) -> None:
        """Tell the observer what has been logged of a stage."""
        for line in self.lines("metrics.jsonl", stage):
            self._observer.metrics(line["step"], line)
        for line in self.lines("samples.jsonl", stage):
            self._observer.sample(line["step"], line)

    def write(self, stage: str, step: int, values: Mapping[str, Any], file: str) -> None:
        """Append one line to a log.

        Args:
            stage: its name.
            step: the step that the line is about.
            values: metrics or a sample; numbers that are not finite become null.
            file: one of `LOGS`.
        """
        known = {name: _null_if_nan(value) for name, value in values.items()}
        line = json.dumps({"stage": stage, "step": step, **known}, ensure_ascii=False)
        path = self._folder / file
        with full_disk_named(path), path.open("a", encoding="utf-8") as out:
            out.write(line + "\n")
        if file == "samples.jsonl":
            self._observer.sample(step, known)
            return
        self._observer.metrics(step, known)
        if self._trackers is not None:
            self._trackers.log(step, values)

    def lines(self, file: str, stage: str | None = None) -> Iterator[dict[str, Any]]:
        """The lines of a log, of one stage or of all; lines torn by a kill are left out."""
        path = self._folder / file
        # a kill may have torn a character as well
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        for line in text.split("\n"):  # not splitlines: a sample may hold other line separators
            try:
                found = json.loads(line)
            except ValueError:
                continue  # the end of the file, or a line torn by a kill
            if stage in (None, found["stage"]):
                yield found

    def last_step(self, stage: str) -> int:
        """The last step of a stage whose metrics are there; -1 without any."""
        return max((line["step"] for line in self.lines("metrics.jsonl", stage)), default=-1)

    def drop(self, stage: str, after: int) -> None:
        """Remove what a stage logged after a step: those steps are about to be done again."""
        for file in LOGS:
            kept = [
                json.dumps(line, ensure_ascii=False) + "\n"
                for line in self.lines(file)
                if line["stage"] != stage or line["step"] <= after
            ]
            if kept or (self._folder / file).exists():
                write_text(self._folder / file, "".join(kept))

    def sync(self) -> None:
        """Sync all lines to the disk."""
        for file in LOGS:
            if (self._folder / file).exists():
                sync(self._folder / file)

    def close(self, failed: bool = False) -> None:
        """Close the trackers."""
        if self._trackers is not None:
            self._trackers.finish(failed)


def _null_if_nan(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    if isinstance(value, list):
        return [_null_if_nan(item) for item in value]
    if isinstance(value, dict):
        return {key: _null_if_nan(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
