"""Trackers: the metrics of metrics.jsonl in other programs, under the same names and steps.

Each stage has a folder of its own in TensorBoard and a run of its own in Weights & Biases, MLflow
and trackio, so its steps are the x-axis. Only the first process has trackers.
"""

from __future__ import annotations

import io
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
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

        TensorBoard forgets the steps after `resumed`. The others cannot: the steps up to `logged`,
        which are done again, are not sent again.

        Args:
            recipe: names the trackers.
            folder: the run folder.
            stage: its name.
            resumed: the step of the checkpoint that is resumed; None at a start.
            logged: the last step logged before; -1 without any.
            notice: is told where the run is shown, and when a tracker fails.

        Raises:
            DenserlError: a tracker is not installed or refuses.
        """
        check_trackers(recipe)
        if recipe.run.trackers:
            from accelerate import PartialState

            PartialState()  # accelerate's trackers log, and its logging asks for it
        self._notice = notice
        self._open: list[tuple[int, GeneralTracker]] = []
        for name, opened in (("wandb", _wandb), ("mlflow", _mlflow), ("trackio", _trackio)):
            if name in recipe.run.trackers:
                last = -1 if resumed is None else logged
                self._open.append((last, opened(recipe, folder, stage, resumed is None, notice)))
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
        """Write what is not written yet and close; W&B and MLflow show which runs failed."""
        for _, tracker in [*self._open]:
            with self._dropped_if_it_fails(tracker), redirect_stdout(io.StringIO()):
                _close(tracker, failed)
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


def _close(tracker: GeneralTracker, failed: bool) -> None:
    """End a tracker's run, as a failed one where the tracker knows such."""
    if tracker.name == "wandb":
        tracker.tracker.finish(exit_code=int(failed))
    elif tracker.name == "mlflow":
        import mlflow

        mlflow.end_run("FAILED" if failed else "FINISHED")
    elif tracker.name == "trackio":
        import trackio

        trackio.finish()  # after the run's own finish, trackio would print once more at exit
    else:
        tracker.finish()


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
        id=_kept(folder / "wandb" / f"{stage}.id", new, lambda: uuid4().hex[:12]),
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


def _mlflow(
    recipe: Recipe, folder: Path, stage: str, new: bool, notice: Callable[[str], None]
) -> GeneralTracker:
    """A run of the tracking server that the environment names, or of a database in the folder."""
    import mlflow
    from accelerate.tracking import MLflowTracker

    logging.getLogger("alembic").setLevel(logging.WARNING)  # the terminal is ours
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    own = (folder / "mlflow").absolute()
    own.mkdir(parents=True, exist_ok=True)
    served = os.environ.get("MLFLOW_TRACKING_URI")
    mlflow.set_tracking_uri(served or f"sqlite:///{own / 'mlflow.db'}")
    file = own / f"{stage}.id"
    tracker = MLflowTracker(
        recipe.run.wandb_project,
        logging_dir=None if served else str(own / "artifacts"),
        run_id=None if new or not file.exists() else file.read_text(encoding="utf-8"),
        run_name=f"{folder.absolute().name} {stage}",
        tags={"stage": stage, "folder": folder.absolute().name},
    )
    try:
        tracker.start()
        if tracker.run_id is None:
            settings = {key: str(value) for key, value in _leaves(recipe_to_dict(recipe))}
            tracker.store_init_configuration(settings)
    except mlflow.MlflowException as error:
        raise DenserlError(
            f"MLflow: {str(error).splitlines()[0]}",
            hint="see MLFLOW_TRACKING_URI, or unset it for a database in the run folder",
        ) from error
    write_text(file, tracker.tracker.info.run_id)
    notice(f"MLflow: run {tracker.tracker.info.run_name} in {mlflow.get_tracking_uri()}")
    return tracker


def _trackio(
    recipe: Recipe, folder: Path, stage: str, new: bool, notice: Callable[[str], None]
) -> GeneralTracker:
    """A run in trackio's own folder, whose dashboard shows all of a project's runs."""
    from accelerate.tracking import TrackioTracker

    number = _kept(folder / "trackio" / f"{stage}.id", new, lambda: uuid4().hex[:6])
    tracker = TrackioTracker(
        recipe.run.wandb_project,
        name=f"{folder.absolute().name} {stage} {number}",  # trackio resumes by name
        group=folder.absolute().name,
        resume="allow",
        config=recipe_to_dict(recipe),
        embed=False,
        auto_log_gpu=False,
        auto_log_cpu=False,
    )
    try:
        with redirect_stdout(io.StringIO()):
            tracker.start()
    except (ValueError, OSError) as error:
        raise DenserlError(
            f"trackio: {error}", hint="see TRACKIO_DIR, or leave it out of run.trackers"
        ) from error
    notice(f"trackio: run {tracker.tracker.name}; trackio show --project {tracker.run_name}")
    return tracker


def _kept(file: Path, new: bool, make: Callable[[], str]) -> str:
    """The id of a stage's run in a tracker, kept in the run folder."""
    if new or not file.exists():
        write_text(file, make())
    return file.read_text(encoding="utf-8")


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of nested mappings with its dotted name."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
