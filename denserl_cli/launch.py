"""Start a stage in this process, or show what it would do."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Literal

from denserl_cli.core.recipe import Recipe, recipe_to_yaml
from denserl_cli.core.run import Mode

Stage = Literal["train-rm", "fit-function", "train-ppo"]

_RANKS = 1  # a stage runs in this one process


def launch(stage: Stage, recipe: Recipe, *, out: Path | None, mode: Mode, dry_run: bool) -> None:
    """Run a stage of the recipe in its run folder.

    out: the run folder; None: `runs/<recipe.name>`. mode: what to do with what an earlier run left
    there. dry_run: print the plan instead, as YAML with comments.
    """
    folder = out or Path("runs") / recipe.name
    if dry_run:
        print(dry_run_text(stage, recipe, folder, mode))
        return
    from denserl_cli.console import make_observer
    from denserl_cli.worker import run_stage

    with make_observer() as observer:
        run_stage(stage, recipe, folder, mode, observer)


def dry_run_text(stage: str, recipe: Recipe, folder: Path, mode: Mode) -> str:
    """Describe what a stage would do: comments on top of the resolved recipe."""
    command = shlex.join(["denserl", *(word for word in sys.argv[1:] if word != "--dry-run")])
    lines = [
        f"stage: {stage} ({mode})",
        f"run folder: {folder.absolute()}",
        *batch_arithmetic(stage, recipe),
        f"command: {command}",
    ]
    comments = "".join(f"# {line}\n" for line in lines)
    return comments + recipe_to_yaml(recipe).rstrip()


def batch_arithmetic(stage: str, recipe: Recipe) -> list[str]:
    """Return one line for each kind of batch of a stage: micro × accumulation × ranks = global."""
    if stage == "train-rm":
        rm = recipe.reward_model
        return [_batch("pairs per step", rm.micro_batch_size, rm.batch_size)]
    if stage == "fit-function":
        size = recipe.normalizer.batch_size
        return [_batch("pairs per forward pass", size, size)]
    ppo = recipe.ppo
    responses = ppo.rollout_batch_size * ppo.samples_per_prompt
    sampled = f"{ppo.rollout_batch_size} prompts × {ppo.samples_per_prompt} samples"
    steps = responses // ppo.train_batch_size
    return [
        f"responses per iteration: {sampled} = {responses}, "
        f"up to {ppo.rollout_micro_batch_size} at a time",
        _batch("responses per step", ppo.micro_batch_size, ppo.train_batch_size),
        f"steps per iteration: {ppo.epochs} epochs × {steps} = {ppo.epochs * steps}",
    ]


def _batch(what: str, micro: int, total: int) -> str:
    accumulation = total // (micro * _RANKS)
    return f"{what}: micro {micro} × accumulation {accumulation} × ranks {_RANKS} = global {total}"
