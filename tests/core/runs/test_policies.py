"""Whose policy answers or is evaluated: the one asked for, the run's own, the published one."""

from __future__ import annotations

from pathlib import Path

import pytest

from denserl_cli.core.errors import DenserlError
from denserl_cli.core.observer import Observer
from denserl_cli.core.recipe import Recipe
from denserl_cli.core.runs.folder import RunFolder
from denserl_cli.core.runs.policies import START, choose_policy
from tests import tiny

PUBLISHED = "published={reward_model: a/rm, granularity: segment, cutoff: 1.0, policy: a/ppo}"


def run_that_is(folder: Path, recipe: Recipe, status: str) -> RunFolder:
    """A run folder that says how far train-ppo got."""
    run = RunFolder(folder, recipe)
    run.started("train-ppo", "start", Observer())
    if status == "finished":
        run.finished("train-ppo", {"iterations": 1})
    return RunFolder(folder, recipe)


def test_what_is_asked_for_comes_first_then_the_runs_own(tmp_path: Path):
    recipe = tiny.recipe(PUBLISHED)
    run = run_that_is(tmp_path / "run", recipe, "finished")
    assert choose_policy(recipe, run, None)[:2] == (str(run.policy), recipe.name)
    assert choose_policy(recipe, run, START)[:2] == (None, f"{recipe.name}-start")
    assert choose_policy(recipe, run, "org/other") == ("org/other", "other", "")
    assert choose_policy(recipe, run, str(tmp_path))[:2] == (str(tmp_path), tmp_path.name)


def test_the_published_policy_is_used_with_a_notice(tmp_path: Path):
    recipe = tiny.recipe(PUBLISHED)
    chosen = choose_policy(recipe, RunFolder(tmp_path / "run", recipe), None)
    assert chosen[:2] == ("a/ppo", "ppo") and "the published one, a/ppo" in chosen.notice


def test_no_policy(tmp_path: Path):
    recipe = tiny.recipe()
    with pytest.raises(DenserlError, match="has no policy"):
        choose_policy(recipe, RunFolder(tmp_path / "run", recipe), None)
    run = run_that_is(tmp_path / "other", recipe, "interrupted")
    with pytest.raises(DenserlError, match="is not finished") as caught:
        choose_policy(recipe, run, None)
    assert caught.value.hint and "--resume" in caught.value.hint


@pytest.mark.parametrize("gone", ["./gone", "../gone/policy", "~/gone/policy", "runs/gone/policy"])
def test_a_folder_that_is_not_there(gone: str, tmp_path: Path):
    recipe = tiny.recipe()
    with pytest.raises(DenserlError, match="no such folder"):
        choose_policy(recipe, RunFolder(tmp_path / "run", recipe), gone)
