"""A stage of a resolved recipe run in its run folder."""

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


def evaluate(
    stage: str, recipe: Recipe, folder: Path, observer: Observer, options: Mapping[str, Any]
) -> dict[str, Any]:
    """Evaluate the reward model or the policy of a run; options: those of the evaluation itself."""
    quiet_libraries()
    from denserl_cli.core.runs.failures import memory_advice

    with memory_advice(stage, recipe):
        judge = resolve_name(STAGES[stage].entry)
        return dict(judge(recipe, RunFolder(folder, recipe), observer, **options))


def run_stage(stage: str, recipe: Recipe, folder: Path, mode: Mode, observer: Observer) -> None:
    """Run one stage of a recipe in its run folder; says so and returns when it is finished.

    Raises:
        DenserlError: another job works in the folder, or something else that the user can mend.
        Interrupted: a signal ended it; the exit code is that of a requeue (75) only where this
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
            quantization(recipe)  # refused before anything is made or loaded
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
    """Keep the libraries' own bars and chatter out of ours; their errors still show."""
    import transformers

    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")  # it is a second to import
    # of names that torch has changed and DeepSpeed has not
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    # it logs to stdout, where results go, and sets its level itself when something imports it
    logging.getLogger("DeepSpeed").addFilter(_is_error)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR
