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
