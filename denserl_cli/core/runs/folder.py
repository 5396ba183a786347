"""A run is a folder: what was asked for, how far each stage got, metrics, checkpoints, results.

recipe.yaml         the resolved recipe of the latest command
run.json            recipe name; for each stage its status, the settings it read, what it ran
                    with (versions, processes, device), its summary
lock                who works here; exists only during that work
metrics.jsonl       every metric of every step: numbers, and lists of them (by location, by length)
samples.jsonl       responses with their segments: of rollouts, to held-out prompts, of one pair
tensorboard/, wandb/    the metrics of metrics.jsonl for trackers, where the recipe asks for them
sandbox/            model, tokenizer and data of the embedded task
checkpoints/STAGE/  full states to resume from
reward_model/       a Hugging Face folder + denserl.json + normalizer.json
policy/             a Hugging Face folder
report.html         what `denserl report` makes of all this
replaced/           results that --fresh moved aside
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from denserl_cli.core.errors import DenserlError, Interrupted, exit_code_of
from denserl_cli.core.recipe import Recipe, recipe_to_yaml
from denserl_cli.core.recipe.stages import STAGES, later_stages
from denserl_cli.core.runs.checkpoints import Checkpoint, Checkpoints, newest_step
from denserl_cli.core.runs.logs import Logs
from denserl_cli.core.runs.run_json import Mode, RunJson
from denserl_cli.core.runs.settings import result_settings, stage_settings
from denserl_cli.core.system.distributed import barrier, is_main_process, world_size
from denserl_cli.core.system.environment import device_name, versions
from denserl_cli.core.system.files import clear_leftovers, write_text
from denserl_cli.core.system.lock import locked
from denserl_cli.core.system.signals import ignore_signals_from_now, set_exit_code

if TYPE_CHECKING:
    from denserl_cli.core.engine.base import Engine
    from denserl_cli.core.observer import Observer

__all__ = ["Mode", "RunFolder"]


class RunFolder:
    """The folder of one recipe's run.

    Attributes:
        path: the folder, which need not exist.
        recipe: the recipe of this command.
        reward_model, normalizer, policy: where results are, or will be.
        run_json: what is recorded of the stages.
        logs: metrics and samples.
    """

    def __init__(self, path: Path, recipe: Recipe) -> None:
        self.path = path
        self.recipe = recipe
        self.reward_model = path / "reward_model"
        self.normalizer = self.reward_model / "normalizer.json"
        self.policy = path / "policy"
        self._new = [folder for folder in (path, *path.parents) if not folder.exists()]
        self._locked = False
        self._from_step: int | None = None
        self.logs = Logs(path)
        self.run_json = self._read_run_json()

    def skipped_file(self, stage: str) -> Path:
        """Where a stage lists the rows that it cannot use."""
        return self.path / f"skipped-{stage}.jsonl"

    def evaluation_file(self, stage: str, name: str | None = None) -> Path:
        """Where an evaluation writes its metrics. name: of the data, where it has one."""
        words = [STAGES[stage].subject, *([name] if name else [])]
        return self.path / "evaluation" / f"{'-'.join(words)}.json"

    def _read_run_json(self) -> RunJson:
        file = self.path / "run.json"
        if not file.exists():
            if self.path.is_file() or _in_use(self.path):
                raise DenserlError(
                    f"{self.path} is not empty and not a denserl run",
                    hint="name a new folder with --out",
                )
            return RunJson(file, self.recipe.name)
        found = RunJson.read(file)
        if found.recipe != self.recipe.name:
            raise DenserlError(
                f"{self.path} holds a run of recipe {found.recipe}, not of {self.recipe.name}",
                hint="name another folder with --out",
            )
        return found

    # what is recorded of the stages

    def summary(self, stage: str) -> dict[str, Any] | None:
        """What a finished stage reported; None while it is not finished."""
        return self.run_json.summary(stage)

    def interrupted(self, stage: str) -> bool:
        """Whether a stage was started and not finished."""
        return self.run_json.interrupted(stage)

    def admit(self, stage: str, mode: Mode) -> bool:
        """Whether a stage has work to do under this recipe (see `RunJson.admit`)."""
        return self.run_json.admit(stage, stage_settings(self.recipe, stage), mode)

    def check_settings(self, stage: str, blocks: Sequence[str] = ()) -> None:
        """Refuse to read work of a stage under other settings (see `RunJson.check_settings`)."""
        hint = "give it the settings that the run had; its own recipe has them: "
        hint += f"--recipe {self.path / 'recipe.yaml'} --out {self.path}"
        self.run_json.check_settings(stage, stage_settings(self.recipe, stage), blocks, hint)

    def check_later(self, stage: str) -> None:
        """Refuse to replace work of later stages (see `RunJson.check_later`)."""
        self.run_json.check_later(stage)

    # who works here

    @contextmanager
    def locked(self, observer: Observer) -> Iterator[None]:
        """Keep every other job out; what the last one left is read and tidied first.

        Raises:
            DenserlError: another job works here; the message names it.
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
                self.run_json = self._read_run_json()
                yield
            finally:
                self._locked = False

    @contextmanager
    def attempt(self, stage: str) -> Iterator[None]:
        """Record how an attempt at a stage ends, once it has started.

        An interruption by a scheduler gets its exit code here: 75, run it again, where the attempt
        has written a checkpoint.
        """
        code = 0
        try:
            yield
        except BaseException as error:
            if isinstance(error, Interrupted):
                set_exit_code(error, progressed=self._has_progressed(stage))
            code = exit_code_of(error)
            raise
        finally:
            if self._from_step is not None and is_main_process():
                with suppress(OSError):  # a full disk has been told
                    self.run_json.end(stage, code)

    def _has_progressed(self, stage: str) -> bool:
        """Whether this attempt has written a checkpoint beyond the one that it went on from."""
        newest = newest_step(self.path, stage)
        return self._from_step is not None and newest is not None and newest > self._from_step

    def claim(self) -> None:
        """Make the folder this recipe's."""
        if not is_main_process():
            return
        if not self.run_json.file.exists():
            self.run_json.write()
        write_text(self.path / "recipe.yaml", recipe_to_yaml(self.recipe))

    def abandon(self) -> None:
        """Remove the folder if this command made it and no stage has started in it."""
        if is_main_process() and self._new and not self.run_json.stages:
            shutil.rmtree(self.path, ignore_errors=True)
            for parent in self._new[1:]:
                with suppress(OSError):  # somebody else has put something there
                    parent.rmdir()

    # a stage from its start to its end

    def started(
        self, stage: str, mode: Mode, observer: Observer, steps: int | None = None
    ) -> Checkpoint | None:
        """Record that a stage is under way.

        Unless a checkpoint is resumed, the results of this stage and of those after it are moved
        aside: they belong to the work that is being replaced.

        Args:
            stage: its name.
            mode: what to do with an earlier attempt.
            observer: is told what is moved, and what the logs have lost.
            steps: how many the whole stage has, where it has any.

        Returns:
            The checkpoint to go on from, if there is one.
        """
        latest = self.latest_checkpoint(stage, observer) if mode == "resume" else None
        if mode == "resume" and latest is None and self.interrupted(stage):
            observer.notice(f"no checkpoint of {stage} to go on from; it starts again")
        barrier()  # nothing is changed before all processes have read it
        if is_main_process():
            resumed = latest.step if latest else None
            self.logs.follow(self.recipe, stage, resumed, observer)  # first: a tracker may refuse
            self._begin(stage, latest, observer, steps)
            self.logs.replay(stage)
        barrier()
        self._from_step = latest.step if latest else 0
        return latest

    def _begin(
        self, stage: str, latest: Checkpoint | None, observer: Observer, steps: int | None
    ) -> None:
        """Record a stage's start and move aside what it replaces."""
        replaced = [stage, *later_stages(stage)] if latest is None else []
        for name in replaced:
            self._checkpoints(name).clear()
        entry: dict[str, Any] = {
            "settings": stage_settings(self.recipe, stage),
            "versions": versions(),
            "processes": world_size(),
            "device": device_name(),
        }
        if steps is not None:
            entry["steps"] = steps
        # before the results go, or a kill could leave a finished stage without
        self.run_json.start(stage, entry, replaced)
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
        """Record that a stage is finished and what it reports; its checkpoints are removed.

        From here on no signal ends the stage any more.
        """
        if not is_main_process():
            return
        self.run_json.finish(stage, summary)
        ignore_signals_from_now()
        self._checkpoints(stage).clear()

    @contextmanager
    def tracked(self) -> Iterator[None]:
        """Close the trackers of a stage at its end, however it ends."""
        try:
            yield
        except BaseException:
            self.logs.close(failed=True)
            raise
        self.logs.close()

    def log(
        self, stage: str, step: int, metrics: Mapping[str, Any], *, file: str = "metrics.jsonl"
    ) -> None:
        """Append one line to metrics.jsonl, or to samples.jsonl."""
        if is_main_process():
            self.logs.write(stage, step, metrics, file)

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

        Args:
            stage: its name.
            step: the number of steps after which it is taken.
            state: what one process holds of it.
            shards: engines by name, which write the rest (see `Checkpoints.save`).

        Raises:
            DenserlError: the disk is full; the earlier checkpoints are intact then.
        """
        self.logs.sync()  # or a power cut could leave a checkpoint without the lines before it
        self._checkpoints(stage).save(step, state, shards)

    def latest_checkpoint(self, stage: str, observer: Observer) -> Checkpoint | None:
        """The newest checkpoint that can be read; damaged ones are passed over with a notice."""
        return self._checkpoints(stage).latest(observer)

    def _checkpoints(self, stage: str) -> Checkpoints:
        limits = self.recipe.run
        return Checkpoints(
            self.path / "checkpoints" / stage,
            result_settings(self.recipe, stage),
            keep=limits.keep_checkpoints,
            gigabytes=limits.keep_gigabytes,
        )

    def _move_aside(self, stages: Iterable[str]) -> str:
        """Move the results of stages to `replaced`; returns their names there."""
        moved = []
        for name in stages:
            for result in STAGES[name].results:
                old = self.path / result
                if old.exists():
                    new = _unused(self.path / "replaced" / result)
                    new.parent.mkdir(parents=True, exist_ok=True)
                    old.rename(new)
                    moved.append(str(new.relative_to(self.path / "replaced")))
        return ", ".join(moved)


def _in_use(folder: Path) -> bool:
    """Whether a folder holds more than a job leaves that was killed before it had claimed it."""
    names = [file.name for file in folder.iterdir()] if folder.is_dir() else []
    return any(n != "lock" and not (n.startswith(".") and n.endswith(".tmp")) for n in names)


def _unused(path: Path) -> Path:
    """The path with the first number behind it that is not taken."""
    number = 1
    while path.with_name(f"{path.name}.{number}").exists():
        number += 1
    return path.with_name(f"{path.name}.{number}")
