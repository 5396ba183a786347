"""denserl export: options to folders."""

from __future__ import annotations

from pathlib import Path

from click.testing import Result
from transformers import AutoModelForSequenceClassification
from typer.testing import CliRunner

from denserl_cli.app import app
from denserl_cli.core.errors import DenserlError
from tests import tiny


def export(folder: Path, *words: str) -> Result:
    return CliRunner().invoke(
        app, ["export", "-r", "sandbox-segment", "-o", str(folder), *tiny.words(), *words]
    )


def test_the_reward_model_goes_into_the_run_folder_or_elsewhere(scored: Path, tmp_path: Path):
    assert export(scored, "--part", "reward-model").exit_code == 0
    result = export(scored, "--part", "reward-model", "--to", str(tmp_path / "rm"))
    assert result.stdout == f"exported the reward-model to {tmp_path / 'rm'}\n"
    for folder in (scored / "export" / "reward-model", tmp_path / "rm"):
        AutoModelForSequenceClassification.from_pretrained(folder)


def test_again_needs_fresh(scored: Path):
    assert export(scored, "--part", "reward-model").exit_code == 0
    again = export(scored, "--part", "reward-model")
    assert isinstance(again.exception, DenserlError)
    assert "is not empty" in again.exception.message
    assert export(scored, "--part", "reward-model", "--fresh").exit_code == 0


def test_what_is_not_there_is_said(scored: Path):
    result = export(scored)
    assert isinstance(result.exception, DenserlError)
    assert "has no finished policy" in result.exception.message


def test_a_dry_run_writes_nothing(scored: Path):
    result = export(scored, "--part", "reward-model", "--dry-run")
    assert result.stdout.startswith("would write the reward-model of ")
    assert not (scored / "export").exists()


def test_only_a_bandit_reward_model_can_be_a_classifier(scored: Path):
    result = export(scored, "--part", "reward-model", "--as-classifier")
    assert isinstance(result.exception, DenserlError)
    assert "no classifier" in result.exception.message
    assert not (scored / "export").exists()
