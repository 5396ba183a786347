"""A tiny sandbox, made once, and recipes on it that train in a second."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from denserl_cli.core.observer import Observer
from denserl_cli.core.recipe import Recipe, load_recipe
from denserl_cli.core.recipe.schema import SandboxConfig
from denserl_cli.core.sandbox import files as sandbox
from denserl_cli.core.sandbox.files import SandboxFiles
from denserl_cli.core.stages.run import run_stage

TASK = SandboxConfig(
    phrases=5,
    phrase_length=3,
    response_phrases=6,
    pairs=64,
    hidden_size=32,
    layers=1,
    fit_steps=150,
)

MakeRecipe = Callable[..., Recipe]


@pytest.fixture(scope="session")
def slots(tmp_path_factory: pytest.TempPathFactory) -> SandboxFiles:
    """Model, tokenizer and data of a tiny sandbox."""
    folder = tmp_path_factory.mktemp("tiny") / "sandbox"
    return sandbox.make(TASK, folder, seed=1, observer=Observer())


@pytest.fixture(scope="session")
def settings(slots: SandboxFiles) -> list[str]:
    """Overrides of `sandbox-segment` that name the tiny sandbox's files like a user's own."""
    return [
        "sandbox=null",
        f"model.path={slots.model}",
        f"data.preferences=[{slots.preferences}]",
        f"data.prompts=[{slots.prompts}]",
        "data.eval_pairs=8",
        "data.max_length=256",
        "data.max_prompt_length=64",
        "segmentation.cutoff=1.0",
        "optimizer={betas: [0.9, 0.99], clip_norm: 10.0}",
        "reward_model.learning_rate=2e-3",
        "reward_model.batch_size=8",
        "reward_model.micro_batch_size=4",
        "reward_model.epochs=1",
        "reward_model.save_every=2",
        "normalizer.pairs=24",
        "normalizer.batch_size=8",
    ]


@pytest.fixture(scope="session")
def recipe(settings: list[str]) -> MakeRecipe:
    """Makes a recipe on the tiny sandbox; further overrides come last."""
    return lambda *more: load_recipe("sandbox-segment", [*settings, *more])


@pytest.fixture(scope="session")
def trained(recipe: MakeRecipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a finished reward model; to be read, never written to."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    run_stage("train-rm", recipe(), folder, "start", Observer())
    return folder


@pytest.fixture
def run_with_model(trained: Path, tmp_path: Path) -> Path:
    """A copy of a run folder with a finished reward model."""
    return Path(shutil.copytree(trained, tmp_path / "copy"))
