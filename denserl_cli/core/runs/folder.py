"""A run is a folder: what was asked for, how far each stage got, metrics, checkpoints, results.

recipe.yaml         the resolved recipe of the latest command
run.json            recipe name; for each stage its status, the settings it read, what it ran
                    with (versions, processes, device), its summary
lock                who works here; there only for the while
metrics.jsonl       every figure of every step: numbers, and lists of them (by location, by length)
samples.jsonl       responses with their segments: of rollouts, to held-out prompts, of one pair
tensorboard/, wandb/    the figures of metrics.jsonl for trackers, where the recipe asks for them
sandbox/            model, tokenizer and data of the embedded task
checkpoints/STAGE/  full states to resume from
reward_model/       a Hugging Face folder + denserl.json + normalizer.json
policy/             a Hugging Face folder
report.html         what `denserl report` makes of all this
replaced/           results that --fresh moved aside
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from denserl_cli.core.errors import DenserlError
from denserl_cli.core.recipe import Recipe, recipe_to_dict, recipe_to_yaml
from denserl_cli.core.recipe.stages import _MEMORY, READS, RESULTS
from denserl_cli.core.runs.checkpoints import Checkpoint, Checkpoints
from denserl_cli.core.runs.logs import Logs
from denserl_cli.core.runs.run_json import new_book, read_book
from denserl_cli.core.system.distributed import barrier, is_main_process, world_size
from denserl_cli.core.system.environment import device_name, versions
from denserl_cli.core.system.files import clear_leftovers, write_text
from denserl_cli.core.system.lock import locked

if TYPE_CHECKING:
    from denserl_cli.core.engine.base import Engine
    from denserl_cli.core.observer import Observer

Mode = Literal["start", "resume", "fresh"]


class RunFolder:
    """The folder of one recipe's run."""

    def __init__(self, path: Path, recipe: Recipe) -> None:
        self.path = path
        self.recipe = recipe
        self.reward_model = path / "reward_model"
        self.normalizer = self.reward_model / "normalizer.json"
        self.policy = path / "policy"
        self._new = [folder for folder in (path, *path.parents) if not folder.exists()]
        self._locked = False
        self.logs = Logs(path)
        self._book = self._read_book()

    def _read_book(self) -> dict[str, Any]:
        file = self.path / "run.json"
        if not file.exists():
            if self.path.is_file() or _in_use(self.path):
                raise DenserlError(
                    f"{self.path} is not empty and not a denserl run",
                    hint="name a new folder with --out",
                )
            return new_book(self.recipe.name)
        book = read_book(file)
        if book["recipe"] != self.recipe.name:
            raise DenserlError(
                f"{self.path} holds a run of recipe {book['recipe']}, not of {self.recipe.name}",
                hint="name another folder with --out",
            )
        return book

    def summary(self, stage: str) -> dict[str, Any] | None:
        """What a finished stage reported; None while it is not finished."""
        entry = self._book["stages"].get(stage, {})
        return entry.get("summary") if entry.get("status") == "finished" else None

    def interrupted(self, stage: str) -> bool:
        """Whether a stage was started and not finished."""
        return self._book["stages"].get(stage, {}).get("status") == "interrupted"

    def admit(self, stage: str, mode: Mode) -> bool:
        """Decide whether a stage has work to do here; nothing is written.

        Returns False when it is finished. Raises DenserlError when an earlier attempt was
        interrupted and the user said neither --resume nor --fresh, when the folder holds the
        stage's work under other settings, or later stages' that did without it.
        """
        entry = self._book["stages"].get(stage)
        if mode == "fresh":
            return True
        if entry is None:
            self.check_later(stage)
            return True
        self.check_settings(stage)
        if entry["status"] == "finished":
            return False
        if mode == "start":
            raise DenserlError(
                f"{stage} in {self.path} was interrupted",
                hint="go on with --resume, or start it again with --fresh",
            )
        return True

    def check_settings(self, stage: str, blocks: Sequence[str] = ()) -> None:
        """Raise DenserlError when the folder holds a stage's work under other settings.

        blocks: names of those that matter; all when empty.
        """
        entry = self._book["stages"].get(stage)
        changed = [] if entry is None else _differences(entry["settings"], self._settings(stage))
        about = tuple(f"{name}{end}" for name in blocks for end in (".", " "))
        if named := "; ".join(line for line in changed if not about or line.startswith(about)):
            raise DenserlError(
                f"{self.path} holds {stage} under other settings: {named}",
                hint="name another folder with --out, or replace that work with --fresh",
            )

    def check_later(self, stage: str) -> None:
        """Raise DenserlError when the folder holds work of later stages, which would be replaced.

        They did without this one: they scored with a published reward model or normaliser.
        """
        later = [name for name in _after(stage) if name in self._book["stages"]]
        if later:
            raise DenserlError(
                f"{stage} in {self.path} would replace {' and '.join(later)}, done without it",
                hint="name another folder with --out, or replace that work with --fresh",
            )

    @contextmanager
    def locked(self, observer: Observer) -> Iterator[None]:
        """Keep every other job out; what the last one left is read and tidied first.

        Raises DenserlError, naming the holder, when another job works here.
        """
        if self._locked or not is_main_process():
            yield
            return
        self.path.mkdir(parents=True, exist_ok=True)
        with locked(self.path / "lock", observer.notice):
            self._locked = True
            try:
                for folder in (self.path, self.reward_model, *self.path.glob("checkpoints/*")):
                    clear_leftovers(folder)
                self._book = self._read_book()
                yield
            finally:
                self._locked = False

    @contextmanager
    def tracked(self) -> Iterator[None]:
        """Close the trackers of a stage at its end, however it ends."""
        try:
            yield
        except BaseException:
            self.logs.close(failed=True)
            raise
        self.logs.close()

    def skipped_file(self, stage: str) -> Path:
        """Where a stage lists the rows that it cannot use."""
        return self.path / f"skipped-{stage}.jsonl"

    def evaluation_file(self, stage: str, name: str | None = None) -> Path:
        """Where an evaluation leaves its figures. name: of the data, where it has one."""
        words = [stage.removeprefix("evaluate-"), *([name] if name else [])]
        return self.path / "evaluation" / f"{'-'.join(words)}.json"

    def claim(self) -> None:
        """Make the folder this recipe's."""
        if not is_main_process():
            return
        if not (self.path / "run.json").exists():
            self._write_book()
        write_text(self.path / "recipe.yaml", recipe_to_yaml(self.recipe))

    def abandon(self) -> None:
        """Remove the folder if this command made it and no stage got as far as to start."""
        if is_main_process() and self._new and not self._book["stages"]:
            _remove(self.path)
            for parent in self._new[1:]:
                with suppress(OSError):  # somebody else has put something there
                    parent.rmdir()

    def started(self, stage: str, mode: Mode, observer: Observer) -> Checkpoint | None:
        """Record that a stage is under way; returns the checkpoint to go on from.

        Unless that is resumed, the results of this stage and of those after it are moved aside:
        they belong to the work that is being replaced.
        """
        latest = self.latest_checkpoint(stage, observer) if mode == "resume" else None
        if mode == "resume" and latest is None and self.interrupted(stage):
            observer.notice(f"no checkpoint of {stage} to go on from; it starts again")
        barrier()  # nothing is changed before all processes have read it
        if is_main_process():
            kept = latest.step if latest else None
            self.logs.follow(self.recipe, stage, kept, observer)  # first: a tracker may refuse
            self._begin(stage, latest, observer)
            self.logs.replay(stage)
        barrier()
        return latest

    def _begin(self, stage: str, latest: Checkpoint | None, observer: Observer) -> None:
        """Put a stage's start on record and move aside what it replaces."""
        replaced = [stage, *_after(stage)] if latest is None else []
        for name in replaced:
            self._book["stages"].pop(name, None)
            self._checkpoints(name).clear()
        entry = {
            "status": "interrupted",
            "settings": self._settings(stage),
            "versions": versions(),
            "processes": world_size(),
            "device": device_name(),
        }
        self._book["stages"][stage] = entry
        self._write_book()  # before the results go, or a kill could leave a finished stage without
        self.claim()
        if moved := self._move_aside(replaced):
            observer.notice(f"earlier results were moved to {self.path / 'replaced'}: {moved}")
        if latest is not None:
            self._checkpoints(stage).drop_after(latest.step)
        self.logs.drop(stage, after=latest.step if latest else -1)
        if latest is not None and (last := self.logs.last_step(stage)) < latest.step:
            observer.notice(
                f"{self.path / 'metrics.jsonl'} has lost what {stage} logged after step {last}, "
                f"up to step {latest.step}; curves and tables will lack it"
            )

    def finished(self, stage: str, summary: Mapping[str, Any]) -> None:
        """Record that a stage is finished and what it reports; its checkpoints go."""
        if not is_main_process():
            return
        self._book["stages"][stage] |= {"status": "finished", "summary": dict(summary)}
        self._write_book()
        self._checkpoints(stage).clear()

    def log(
        self, stage: str, step: int, figures: Mapping[str, Any], *, file: str = "metrics.jsonl"
    ) -> None:
        """Append one line to metrics.jsonl, or to samples.jsonl."""
        if is_main_process():
            self.logs.write(stage, step, figures, file)

    def metrics(self, stage: str) -> list[dict[str, Any]]:
        """The logged lines of one stage."""
        return list(self.logs.lines("metrics.jsonl", stage))

    def save_checkpoint(
        self,
        stage: str,
        step: int,
        state: Mapping[str, Any],
        shards: Mapping[str, Engine] | None = None,
    ) -> None:
        """Write a complete state aside, rename it into place and drop the oldest ones.

        shards: engines by name, which write what `state` does not hold (see `Checkpoints.save`).
        Raises DenserlError when the disk is full; the earlier checkpoints are intact then.
        """
        self.logs.sync()  # or a power cut could leave a checkpoint without the lines before it
        self._checkpoints(stage).save(step, state, shards)

    def latest_checkpoint(self, stage: str, observer: Observer) -> Checkpoint | None:
        """The newest checkpoint that can be read; damaged ones are passed over with a notice."""
        return self._checkpoints(stage).latest(observer)

    def _settings(self, stage: str) -> dict[str, Any]:
        flat = _flat(recipe_to_dict(self.recipe))
        return {
            key: value
            for key, value in flat.items()
            if any(key == name or key.startswith(name + ".") for name in READS[stage])
        }

    def _checkpoints(self, stage: str) -> Checkpoints:
        kept = self.recipe.run
        return Checkpoints(
            self.path / "checkpoints" / stage,
            {k: v for k, v in self._settings(stage).items() if k not in _MEMORY},
            keep=kept.keep_checkpoints,
            gigabytes=kept.keep_gigabytes,
        )

    def _move_aside(self, stages: list[str]) -> str:
        """Move the results of stages to `replaced`; returns their names there."""
        moved = []
        for name in stages:
            for result in RESULTS[name]:
                old = self.path / result
                if old.exists():
                    place = _unused(self.path / "replaced" / result)
                    place.parent.mkdir(parents=True, exist_ok=True)
                    old.rename(place)
                    moved.append(str(place.relative_to(self.path / "replaced")))
        return ", ".join(moved)

    def _write_book(self) -> None:
        write_text(self.path / "run.json", json.dumps(self._book, indent=2) + "\n")


def _after(stage: str) -> list[str]:
    """The stages that build on a stage's results."""
    return list(READS)[list(READS).index(stage) + 1 :]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    for key in sorted({*old, *new} - {*_MEMORY}):
        before, now = json.dumps(old.get(key)), json.dumps(new.get(key))
        if before != now:
            yield f"{key} was {before}, is {now}"


def _in_use(folder: Path) -> bool:
    """Whether a folder holds more than a job leaves that was killed before it had claimed it."""
    names = [file.name for file in folder.iterdir()] if folder.is_dir() else []
    return any(n != "lock" and not (n.startswith(".") and n.endswith(".tmp")) for n in names)


def _remove(path: Path) -> None:
    import shutil

    shutil.rmtree(path, ignore_errors=True)


def _unused(path: Path) -> Path:
    number = 1
    while path.with_name(f"{path.name}.{number}").exists():
        number += 1
    return path.with_name(f"{path.name}.{number}")
