"""The entry of each process that works: a resolved recipe in, a stage run."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from denserl_cli.core.errors import DenserlError
from denserl_cli.core.recipe import Recipe
from denserl_cli.core.run import Mode, RunFolder
from denserl_cli.core.stopping import stoppable
from denserl_cli.core.tracking import Observer


def run_stage(stage: str, recipe: Recipe, folder: Path, mode: Mode, observer: Observer) -> None:
    """Run one stage of a recipe in its run folder; says so and returns when it is finished.

    Raises DenserlError when another job works in the folder, Interrupted when a signal ends it.
    """
    run = RunFolder(folder, recipe)
    with stoppable(f"{stage} in {folder}"), run.locked(observer):
        if run.admit(stage, mode):
            _work(stage, recipe, run, mode, observer)
        else:
            done = f"{stage} in {folder} is finished"
            observer.notice(f"{done}; nothing to do (--fresh does it again)")


def _work(stage: str, recipe: Recipe, run: RunFolder, mode: Mode, observer: Observer) -> None:
    quiet_libraries()
    from denserl_cli.core.adapters import quantization
    from denserl_cli.core.guards import memory_advice

    try:
        quantization(recipe)  # refused before anything is made or loaded
        with memory_advice(stage, recipe):
            _stage(stage)(recipe, run, mode, observer)
    except DenserlError:
        run.abandon()
        raise


def quiet_libraries() -> None:
    """Keep the libraries' own bars and chatter out of ours; their errors still show."""
    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    # it logs to stdout, where results go, and sets its level itself when something imports it
    logging.getLogger("DeepSpeed").addFilter(_is_error)


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def _stage(name: str) -> Callable[[Recipe, RunFolder, Mode, Observer], None]:
    if name == "train-rm":
        from denserl_cli.core.reward_training import train_reward_model

        return train_reward_model
    if name == "fit-function":
        from denserl_cli.core.fitting import fit_normalizer

        return fit_normalizer
    from denserl_cli.core.ppo.stage import train_policy

    return train_policy
