"""`denserl plan` as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from denserl_cli.app import app
from denserl_cli.core.errors import DenserlError
from tests import tiny

RECIPE = """
model: {path: org/phi}
segmentation: {cutoff: 1.75}
data: {preferences: org/pairs, prompts: org/prompts}
recorded: {gpus: 8, parameters: 3821079552, hidden_size: 3072, intermediate_size: 8192,
  layers: 32, heads: 32, vocabulary: 32064, preference_pairs: 700000, prompts: 60917}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    file = tmp_path / "phi.yaml"
    file.write_text(RECIPE)
    return str(file)


def denserl(*words: str):
    return CliRunner().invoke(app, ["plan", *words])


def test_the_tables_fit_on_a_terminal(recipe: str):
    result = denserl("--recipe", recipe)
    assert result.exit_code == 0, result.exception
    assert max(map(len, result.output.splitlines())) <= 80
    assert "phi: 3.82B weights, 8 x 80 GiB" in result.output
    assert "5,453 steps" in result.output and "in 59 iterations" in result.output


def test_json_says_the_same_in_bytes(recipe: str):
    found = json.loads(denserl("--recipe", recipe, "--gpus", "4", "--json").output)
    assert (found["gpus"], found["parameters"]) == (4, 3_821_079_552)
    settings = found["stages"]["train-rm"]["settings"]
    third = next(s for s in settings if s["zero_stage"] == 3 and not s["offload_optimizer"])
    weights = 3_821_079_552 - 32064 * 3072 + 3072
    assert third["phases"]["update"]["optimizer"] == 12 * weights // 4
    assert third["peak"] == max(sum(phase.values()) for phase in third["phases"].values())
    assert third["set"] == ["reward_model.engine.zero_stage=3"]


def test_what_does_not_fit_is_said_with_what_would(recipe: str):
    result = denserl("--recipe", recipe, "--gpus", "1", "--gpu-memory", "16")
    assert result.exit_code == 0
    assert "nothing fits" in result.output and "too many" in result.output
    assert "--set lora.rank=16" in result.output and "would fit on" in result.output


def test_a_folder_and_the_sandbox_need_no_record(recipe: str, tmp_path: Path):
    tiny.config().save_pretrained(tmp_path / "model")
    result = denserl("--recipe", recipe, "--model", str(tmp_path / "model"))
    assert result.exit_code == 0 and "as the recipe is" in result.output
    assert denserl("--recipe", "sandbox-token", "--gpus", "1").exit_code == 0


def test_an_unknown_model_is_one_clear_message(recipe: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    error = denserl("--recipe", recipe, "--model", "org/never-downloaded").exception
    assert isinstance(error, DenserlError)
    assert "org/never-downloaded is not known" in error.message and "--model" in (error.hint or "")


SHORT = (
    *("--set", "sandbox.pairs=20", "--set", "reward_model.batch_size=64"),
    *("--set", "reward_model.micro_batch_size=16"),
)


def refusal(*words: str) -> DenserlError:
    error = CliRunner().invoke(app, words).exception
    assert isinstance(error, DenserlError), error
    return error


@pytest.mark.parametrize(
    ("stage", "words", "gpus"),
    [
        ("train-rm", SHORT, "1"),
        ("train-rm", (), "8"),
        ("train-rm", (), "3"),
        ("train-ppo", (), "8"),
        ("train-ppo", ("--set", "ppo.rollout.batch_size=64", "--set", "ppo.iterations=2"), "1"),
    ],
)
def test_a_stage_is_refused_in_the_words_of_the_dry_run(
    stage: str, words: tuple[str, ...], gpus: str
):
    asked = ("--recipe", "sandbox-segment", *words)
    theirs = refusal(stage, *asked, "--dry-run", "--processes", gpus)
    ours = refusal("plan", *asked, "--gpus", gpus)
    assert f"{stage}: {theirs.message}" in ours.message.splitlines()
    assert theirs.hint in (ours.hint or "").splitlines()
    shown = denserl(*asked, "--gpus", gpus).output
    assert f"{stage} would not run: {theirs.message}" in shown
    _, _, section = shown.partition(f"{stage} would not run")
    assert "its memory would fit with" in section.partition("GiB  ")[0]
    assert "as the recipe is" not in section.partition("GiB  ")[0]
    found = json.loads(denserl(*asked, "--gpus", gpus, "--json").output)["stages"][stage]
    assert (found["refused"], found["work"]) == (theirs.message, None)


def test_steps_are_those_of_the_dry_run():
    asked = ("--recipe", "sandbox-segment", "--set", "ppo.iterations=null")
    plan = denserl(*asked, "--json")
    dry_run = CliRunner().invoke(app, ["train-ppo", *asked, "--dry-run"]).output
    steps = json.loads(plan.output)["stages"]["train-ppo"]["work"]["steps"]
    assert f"# optimizer steps: 1 × {steps} = {steps}\n" in dry_run
    assert "in 1 iterations" in denserl(*asked).output


def test_gpus_on_which_a_batch_cannot_be_shared_are_not_proposed(recipe: str):
    asked = ("--recipe", recipe, "--gpu-memory", "30", "--set", "reward_model.micro_batch_size=64")
    wide = denserl(*asked, "--gpus", "2", "--set", "reward_model.batch_size=4096", "--json")
    narrow = denserl(*asked, "--gpus", "2", "--set", "reward_model.batch_size=128", "--json")
    stages = [json.loads(one.output)["stages"]["train-rm"] for one in (wide, narrow)]
    assert [one["chosen"] for one in stages] == [None, None]
    assert stages[1]["enough_gpus"] is None
