"""Runs a stage or an evaluation of a recipe in its run folder."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from denserl_cli.core.errors import DenserlError
from denserl_cli.core.observer import Observer
from denserl_cli.core.recipe import Recipe
from denserl_cli.core.recipe.stages import STAGES
from denserl_cli.core.runs.folder import Mode, RunFolder
from denserl_cli.core.system.distributed import broadcast_object, is_main_process
from denserl_cli.core.system.signals import ignore_signals_from_now, stoppable
from denserl_cli.core.system.verbosity import verbosity


def evaluate(
    stage: str, recipe: Recipe, folder: Path, observer: Observer, options: Mapping[str, Any]
) -> dict[str, Any]:
    """Evaluate the reward model or the policy of a run.

    Args:
        stage: evaluate-rm or evaluate-policy.
        recipe: Of the run.
        folder: Of the run.
        observer: Told progress and results.
        options: Keyword arguments of the evaluation.

    Returns:
        The results.
    """
    quiet_libraries()
    from denserl_cli.core.runs.failures import memory_advice

    with memory_advice(stage, recipe):
        judge = resolve_name(STAGES[stage].entry)
        return dict(judge(recipe, RunFolder(folder, recipe), observer, **options))


def run_stage(stage: str, recipe: Recipe, folder: Path, mode: Mode, observer: Observer) -> None:
    """Run one stage of a recipe in its run folder; a finished one only gives a notice.

    Args:
        stage: Its name.
        recipe: As it was loaded.
        folder: Of the run.
        mode: Start, resume or do the stage again.
        observer: Told progress and results.

    Raises:
        DenserlError: Another job works in the folder, or the stage fails for a reason that the user
            can correct.
        Interrupted: A signal ended it; the exit code is that of a requeue (75) only where this
            attempt has written a checkpoint.
    """
    run = RunFolder(folder, recipe)
    work = f"{stage} in {folder}"
    with (
        stoppable(work),
        run.locked(observer),
        run.attempt(stage),
        stoppable(work),
        run.tracked(),
    ):
        if not broadcast_object(is_main_process() and run.admit(stage, mode)):
            observer.notice(f"{work} is finished; nothing to do (--fresh does it again)")
            return
        quiet_libraries()
        from denserl_cli.core.models.lora import quantization
        from denserl_cli.core.runs.failures import memory_advice

        try:
            quantization(recipe)  # raises before anything is made or loaded
            with memory_advice(stage, recipe):
                stage_function(stage)(recipe, run, mode, observer)
            ignore_signals_from_now()
        except DenserlError:
            run.abandon()
            raise


def stage_function(stage: str) -> Callable[[Recipe, RunFolder, Mode, Observer], None]:
    """The function that runs a stage."""
    function: Callable[[Recipe, RunFolder, Mode, Observer], None]
    function = resolve_name(STAGES[stage].entry)
    return function


def quiet_libraries() -> None:
    """Switch off the libraries' progress bars and messages, except their errors.

    With `--verbose` they stay on.
    """
    if verbosity() == "verbose":
        return
    import transformers

    # a variable, because importing datasets takes a second
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    # DeepSpeed uses names that torch has deprecated
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    # DeepSpeed logs to stdout, where results go, and sets its level when it is imported
    logging.getLogger("DeepSpeed").addFilter(_is_error)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR
