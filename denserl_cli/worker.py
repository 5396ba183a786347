"""The entry of each process that works: a resolved recipe in, a stage run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from denserl_cli.core.errors import DenserlError
from denserl_cli.core.recipe import Recipe
from denserl_cli.core.run import Mode, RunFolder
from denserl_cli.core.tracking import Observer


def run_stage(stage: str, recipe: Recipe, folder: Path, mode: Mode, observer: Observer) -> None:
    """Run one stage of a recipe in its run folder; says so and returns when it is finished."""
    run = RunFolder(folder, recipe)
    if not run.admit(stage, mode):
        observer.notice(f"{stage} in {folder} is finished; nothing to do (--fresh does it again)")
        return
    quiet_libraries()
    try:
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


def _stage(name: str) -> Callable[[Recipe, RunFolder, Mode, Observer], None]:
    if name == "train-rm":
        from denserl_cli.core.reward_training import train_reward_model

        return train_reward_model
    if name == "fit-function":
        from denserl_cli.core.fitting import fit_normalizer

        return fit_normalizer
    from denserl_cli.core.ppo.stage import train_policy

    return train_policy
