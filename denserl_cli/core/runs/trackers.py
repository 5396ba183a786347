"""TensorBoard and Weights & Biases: the figures of metrics.jsonl under the same names and steps.

Each stage has a folder of its own in TensorBoard and a run of its own in Weights & Biases, so its
steps are the x-axis of both. Only the first process has trackers.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from denserl_cli.core.errors import DenserlError
from denserl_cli.core.recipe import recipe_to_dict
from denserl_cli.core.system.files import write_text

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

    from denserl_cli.core.recipe import Recipe

STAGES = ("train-rm", "train-ppo")
"""The stages that log figures."""


def check_trackers(recipe: Recipe) -> None:
    """Raise DenserlError when a tracker that the recipe asks for is not installed."""
    if missing := [name for name in recipe.run.trackers if find_spec(name) is None]:
        raise DenserlError(
            f"run.trackers asks for {' and '.join(missing)}, which is not installed",
            hint=f"pip install 'denserl[{','.join(missing)}]', or leave it out of run.trackers",
        )


class Trackers:
    """The trackers of one stage of a run."""

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        stage: str,
        kept: int | None,
        logged: int,
        notice: Callable[[str], None],
    ) -> None:
        """Open them; where a checkpoint is resumed they go on as they were.

        kept: the checkpoint's step, None at a start. logged: the last step logged before; -1: none.
        TensorBoard forgets the steps after `kept`. Weights & Biases cannot: the steps up to
        `logged`, which are done again, are not sent again.

        Raises DenserlError when Weights & Biases refuses.
        """
        check_trackers(recipe)
        self._notice = notice
        self._open: list[tuple[int, GeneralTracker]] = []
        if "wandb" in recipe.run.trackers:
            last = -1 if kept is None else logged
            self._open.append((last, _wandb(recipe, folder, stage, kept is None, notice)))
        if "tensorboard" in recipe.run.trackers:
            last = -1 if kept is None else kept
            self._open.append((last, _tensorboard(folder, stage, kept)))

    def log(self, step: int, figures: Mapping[str, Any]) -> None:
        """Send the numbers among the figures of a step."""
        for last, tracker in [*self._open]:
            if step > last:
                with self._at_its_own_risk(tracker):
                    tracker.log(dict(numbers(figures)), step=step)

    def finish(self, failed: bool) -> None:
        """Write what is not written yet and close; Weights & Biases shows which runs failed."""
        for _, tracker in [*self._open]:
            with self._at_its_own_risk(tracker):
                if failed and tracker.name == "wandb":
                    tracker.tracker.finish(exit_code=1)
                else:
                    tracker.finish()
        self._open = []

    @contextmanager
    def _at_its_own_risk(self, tracker: GeneralTracker) -> Iterator[None]:
        """Go on without a tracker that fails, whatever it is: a checkpoint matters more."""
        try:
            yield
        except Exception as error:
            self._open = [one for one in self._open if one[1] is not tracker]
            self._notice(
                f"{tracker.name} failed and hears no more of this stage: {error or repr(error)}; "
                "metrics.jsonl has every figure"
            )


def numbers(figures: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Every number with its name; those of a list or mapping as `name/0` or `name/key`."""
    for name, value in figures.items():
        if isinstance(value, int | float):
            yield f"{prefix}{name}", value
        elif isinstance(value, list | tuple):
            yield from numbers({str(i): v for i, v in enumerate(value)}, f"{prefix}{name}/")
        elif isinstance(value, Mapping):
            yield from numbers(value, f"{prefix}{name}/")


def _tensorboard(folder: Path, stage: str, kept: int | None) -> GeneralTracker:
    from accelerate.tracking import TensorBoardTracker

    place = folder / "tensorboard"
    if kept is None:
        shutil.rmtree(place / stage, ignore_errors=True)
    tracker = TensorBoardTracker(stage, place, purge_step=None if kept is None else kept + 1)
    tracker.start()
    return tracker


def _wandb(
    recipe: Recipe, folder: Path, stage: str, new: bool, notice: Callable[[str], None]
) -> GeneralTracker:
    """A run named after folder and stage; the stages of a folder are a group."""
    import wandb
    from accelerate.tracking import WandBTracker

    tracker = WandBTracker(
        os.environ.get("WANDB_PROJECT") or recipe.run.wandb_project,
        id=_wandb_id(folder / "wandb" / f"{stage}.id", new),
        resume="allow",
        name=f"{folder.absolute().name} {stage}",
        group=folder.absolute().name,
        job_type=stage,
        dir=str(folder),
        config=recipe_to_dict(recipe),
        settings=wandb.Settings(console="off", silent=True),  # the terminal is ours
    )
    try:
        tracker.start()
    except wandb.Error as error:
        raise DenserlError(
            f"Weights & Biases: {error}",
            hint="log in with `wandb login`, or keep the run on disk with WANDB_MODE=offline",
        ) from error
    run = tracker.tracker
    notice(f"Weights & Biases: {f'offline in {run.sync_dir}' if run.offline else run.url}")
    return tracker


def _wandb_id(file: Path, new: bool) -> str:
    """The id of a stage's run in Weights & Biases, kept in the run folder."""
    if new or not file.exists():
        write_text(file, uuid4().hex[:12])
    return file.read_text(encoding="utf-8")
