"""run.json: whose run a folder holds, and for each stage how far it got and under which settings.

    {"schema": 1, "recipe": NAME, "dtype": TYPE, "stages": {STAGE: ENTRY, ...}}

TYPE is what `model.dtype: auto` was decided to be for this run, where the recipe says auto.
An ENTRY has `status` (interrupted or finished), `settings` (by dotted name), `versions`,
`processes`, `device`, `steps` where it has any, `exit_code` when the last attempt has ended, and
`summary` once it is finished.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from denserl_cli.core.errors import DenserlError
from denserl_cli.core.recipe.stages import CHANGEABLE, later_stages
from denserl_cli.core.runs.earlier_settings import as_named_now
from denserl_cli.core.runs.settings import differences
from denserl_cli.core.system.files import write_text

SCHEMA = 1
"""Version of run.json."""

Dtype = Literal["float32", "bfloat16"]
Mode = Literal["start", "resume", "fresh"]
_OTHER_FOLDER = "name another folder with --out, or replace that work with --fresh"


class RunJson:
    """The content of a run.json. file: where it is written to; it need not exist yet."""

    def __init__(self, file: Path, recipe: str) -> None:
        self.file = file
        self._content: dict[str, Any] = {"schema": SCHEMA, "recipe": recipe, "stages": {}}

    @classmethod
    def read(cls, file: Path) -> RunJson:
        """Read a run.json.

        Raises:
            DenserlError: it is damaged, or of another schema.
        """
        hint = "name another folder"
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            _check(content)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DenserlError(f"{file} is damaged: {error}", hint=hint) from error
        if content.get("schema", SCHEMA) != SCHEMA:
            what = f"schema {content['schema']!r}, this version reads {SCHEMA}"
            raise DenserlError(f"{file}: {what}", hint=hint)
        found = cls(file, content["recipe"])
        found._content = content  # with what other versions may have added
        return found

    def write(self) -> None:
        """Write it aside and rename it into place."""
        write_text(self.file, json.dumps(self._content, indent=2) + "\n")

    @property
    def recipe(self) -> str:
        """Name of the recipe whose run it is."""
        return self._content["recipe"]

    @property
    def dtype(self) -> Dtype | None:
        """What `model.dtype: auto` is in this run; None while it is not decided."""
        return self._content.get("dtype")

    @dtype.setter
    def dtype(self, decided: Dtype) -> None:
        """Keep the decision; it is written with the next stage that starts."""
        self._content["dtype"] = decided

    @property
    def stages(self) -> dict[str, dict[str, Any]]:
        """The entries of the stages that were started, by stage."""
        return self._content["stages"]

    def summary(self, stage: str) -> dict[str, Any] | None:
        """What a finished stage reported; None while it is not finished."""
        entry = self.stages.get(stage, {})
        return entry.get("summary") if entry.get("status") == "finished" else None

    def interrupted(self, stage: str) -> bool:
        """Whether a stage was started and not finished."""
        return self.stages.get(stage, {}).get("status") == "interrupted"

    def start(self, stage: str, entry: Mapping[str, Any], replaced: Iterable[str]) -> None:
        """Record and write that a stage has started.

        Args:
            stage: its name.
            entry: its settings and what it runs with.
            replaced: stages whose entries are removed.
        """
        for name in replaced:
            self.stages.pop(name, None)
        self.stages[stage] = {"status": "interrupted", **entry}
        self.write()

    def finish(self, stage: str, summary: Mapping[str, Any]) -> None:
        """Record and write that a stage is finished and what it reports."""
        self.stages[stage] |= {"status": "finished", "summary": dict(summary)}
        self.write()

    def end(self, stage: str, code: int) -> None:
        """Record and write the exit code of an attempt at a stage; one that is killed has none."""
        self.stages[stage]["exit_code"] = code
        self.write()

    def admit(self, stage: str, settings: Mapping[str, Any], mode: Mode) -> bool:
        """Decide whether a stage has work to do; nothing is written.

        Args:
            stage: its name.
            settings: what it reads of the recipe now.
            mode: what the user asks for.

        Returns:
            False when the stage is finished.

        Raises:
            DenserlError: an earlier attempt was interrupted and the user asks for neither --resume
                nor --fresh; or the folder holds the stage's work under other settings, or work of
                later stages that did without it.
        """
        entry = self.stages.get(stage)
        if mode == "fresh":
            return True
        if entry is None:
            self.check_later(stage)
            return True
        self.check_settings(stage, settings)
        if entry["status"] == "finished":
            return False
        if mode == "start":
            raise DenserlError(
                f"{stage} in {self.file.parent} was interrupted",
                hint="go on with --resume, or start it again with --fresh",
            )
        return True

    def check_settings(
        self, stage: str, settings: Mapping[str, Any], blocks: Sequence[str] = (), hint: str = ""
    ) -> None:
        """Raise DenserlError when the folder holds a stage's work under other settings.

        Args:
            stage: its name; a stage that was never started passes.
            settings: what it reads of the recipe now.
            blocks: names of the recipe's blocks that matter; all when empty.
            hint: what helps; other words than for a stage that is about to train.
        """
        if stage not in self.stages:
            return
        recorded = as_named_now(self.stages[stage]["settings"], settings)
        changed = differences(recorded, settings, ignored=CHANGEABLE)
        about = tuple(f"{name}{end}" for name in blocks for end in (".", " "))
        if named := "; ".join(line for line in changed if not about or line.startswith(about)):
            raise DenserlError(
                f"{self.file.parent} holds {stage} under other settings: {named}",
                hint=hint or _OTHER_FOLDER,
            )

    def check_later(self, stage: str) -> None:
        """Raise DenserlError when there is work of later stages, which would be replaced.

        Such work did without this stage: it scored with a published reward model or normaliser.
        """
        later = [name for name in later_stages(stage) if name in self.stages]
        if later:
            raise DenserlError(
                f"{stage} in {self.file.parent} would replace {' and '.join(later)}, "
                "done without it",
                hint=_OTHER_FOLDER,
            )


def _check(content: Any) -> None:
    """Raise KeyError or TypeError unless this is the content of a run.json."""
    if not isinstance(content["recipe"], str) or not isinstance(content["stages"], dict):
        raise TypeError("recipe or stages of another kind")
    for name, entry in content["stages"].items():
        if not isinstance(entry["status"], str) or not isinstance(entry["settings"], dict):
            raise TypeError(f"{name} of another kind")
