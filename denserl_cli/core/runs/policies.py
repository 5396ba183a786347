"""Which policy a command uses: the one the user names, the run's own or the published one."""

from __future__ import annotations

from os.path import expanduser
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from denserl_cli.core.errors import DenserlError
from denserl_cli.core.recipe.checks import looks_local
from denserl_cli.core.recipe.stages import TRAIN_PPO

if TYPE_CHECKING:
    from denserl_cli.core.recipe.schema import Recipe
    from denserl_cli.core.runs.folder import RunFolder

START = "start"
"""In place of a policy's path: the recipe's starting model."""


class Policy(NamedTuple):
    """A policy that a command uses.

    path: folder or hub name; None for the starting model. name: what to call it. notice: what the
    user should know about the choice.
    """

    path: str | None
    name: str
    notice: str = ""


def choose_policy(recipe: Recipe, run: RunFolder, asked: str | None) -> Policy:
    """The policy that the user names; else the run's own; else the one published with the recipe.

    Args:
        recipe: may name a published policy.
        run: may have a policy of its own.
        asked: hub name, folder, or START; None when the user names none.

    Raises:
        DenserlError: there is no policy, or the run's own is not finished.
    """
    if asked == START:
        return Policy(None, f"{recipe.name}-start")
    if asked is not None:
        return _given(expanduser(asked))
    if run.interrupted(TRAIN_PPO):
        raise DenserlError(
            f"train-ppo in {run.path} is not finished",
            hint="finish it with denserl train-ppo --resume, or name a policy with --policy",
        )
    if run.summary(TRAIN_PPO) is not None:
        return Policy(str(run.policy), recipe.name)
    if recipe.published is not None and recipe.published.policy:
        path = recipe.published.policy
        notice = f"{run.path} has no policy; using the published one, {path}"
        return _given(path)._replace(notice=notice)
    raise DenserlError(
        f"{run.path} has no policy",
        hint=f"run denserl train-ppo --recipe {recipe.name}, or name a policy with --policy",
    )


def _given(path: str) -> Policy:
    if looks_local(path) and not Path(path).is_dir():
        raise DenserlError(f"--policy {path}: no such folder", hint="check the path")
    return Policy(path, Path(path).resolve().name)
