"""Start a stage in this process, or show what it would do."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Literal

from denserl_cli.core.recipe import Recipe, recipe_to_yaml
from denserl_cli.core.run import Mode
from denserl_cli.plan import plan_lines

Stage = Literal["train-rm", "fit-function", "train-ppo"]


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
        *plan_lines(stage, recipe),
        f"command: {command}",
    ]
    comments = "".join(f"# {line}\n" for line in lines)
    return comments + recipe_to_yaml(recipe).rstrip()
