"""TensorBoard and Weights & Biases: the metrics of metrics.jsonl under the same names and steps.

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


def check_trackers(recipe: Recipe) -> None:
    """Raise DenserlError when a tracker that the recipe names is not installed."""
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
        resumed: int | None,
        logged: int,
        notice: Callable[[str], None],
    ) -> None:
        """Open them; where a checkpoint is resumed they go on as they were.

        TensorBoard forgets the steps after `resumed`. Weights & Biases cannot: the steps up to
        `logged`, which are done again, are not sent again.

        Args:
            recipe: names the trackers.
            folder: the run folder.
            stage: its name.
            resumed: the step of the checkpoint that is resumed; None at a start.
            logged: the last step logged before; -1 without any.
            notice: is told where the run is shown, and when a tracker fails.

        Raises:
            DenserlError: a tracker is not installed, or Weights & Biases refuses.
        """
        check_trackers(recipe)
        self._notice = notice
        self._open: list[tuple[int, GeneralTracker]] = []
        if "wandb" in recipe.run.trackers:
            last = -1 if resumed is None else logged
            self._open.append((last, _wandb(recipe, folder, stage, resumed is None, notice)))
        if "tensorboard" in recipe.run.trackers:
            last = -1 if resumed is None else resumed
            self._open.append((last, _tensorboard(folder, stage, resumed)))

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Send the numbers among the metrics of a step."""
        for last, tracker in [*self._open]:
            if step > last:
                with self._dropped_if_it_fails(tracker):
                    tracker.log(dict(numbers(metrics)), step=step)

    def finish(self, failed: bool) -> None:
        """Write what is not written yet and close; Weights & Biases shows which runs failed."""
        for _, tracker in [*self._open]:
            with self._dropped_if_it_fails(tracker):
                if failed and tracker.name == "wandb":
                    tracker.tracker.finish(exit_code=1)
                else:
                    tracker.finish()
        self._open = []

    @contextmanager
    def _dropped_if_it_fails(self, tracker: GeneralTracker) -> Iterator[None]:
        """Go on without a tracker that fails, for whatever reason: training matters more."""
        try:
            yield
        except Exception as error:
            self._open = [one for one in self._open if one[1] is not tracker]
            self._notice(
                f"{tracker.name} failed and gets nothing more of this stage: "
                f"{error or repr(error)}; metrics.jsonl has every metric"
            )


def numbers(metrics: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Every number with its name; those of a list or mapping as `name/0` or `name/key`."""
    for name, value in metrics.items():
        if isinstance(value, int | float):
            yield f"{prefix}{name}", value
        elif isinstance(value, list | tuple):
            yield from numbers({str(i): v for i, v in enumerate(value)}, f"{prefix}{name}/")
        elif isinstance(value, Mapping):
            yield from numbers(value, f"{prefix}{name}/")


def _tensorboard(folder: Path, stage: str, resumed: int | None) -> GeneralTracker:
    from accelerate.tracking import TensorBoardTracker

    logs = folder / "tensorboard"
    if resumed is None:
        shutil.rmtree(logs / stage, ignore_errors=True)
    purged_from = None if resumed is None else resumed + 1
    tracker = TensorBoardTracker(stage, logs, purge_step=purged_from)
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
