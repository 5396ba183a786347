"""denserl demo, on the smallest sandbox that has something to show."""

from __future__ import annotations

from pathlib import Path

from click.testing import Result
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from denserl_cli.app import app
from tests import tiny


def demo(folder: Path, *words: str) -> Result:
    return CliRunner().invoke(app, ["demo", "-o", str(folder), *words])


def test_the_demo_makes_everything_and_says_where(tmp_path: Path):
    folder = tmp_path / "demo"
    first = demo(folder, *tiny.words())
    assert first.exit_code == 0, first.exception
    for words in (
        "phrase boundaries found (precision)",
        "reward model accuracy",
        "true reward before PPO",
        "true reward after PPO",
        "best possible true reward",
        str(folder / "export" / "policy"),
    ):
        assert words in first.stdout
    for name in ("metrics.jsonl", "samples.jsonl", "reward_model/normalizer.png", "report.html"):
        assert (folder / name).exists()
    AutoModelForCausalLM.from_pretrained(folder / "export" / "policy")
    policy = (folder / "policy" / "model.safetensors").read_bytes()
    again = demo(folder, *tiny.words(), "--resume")
    assert again.exit_code == 0
    assert again.stderr.count("is finished; nothing to do") == 3
    assert (folder / "policy" / "model.safetensors").read_bytes() == policy


def test_a_demo_without_evaluation_has_gaps_and_no_traceback(tmp_path: Path):
    words = tiny.words("data.eval_pairs=0", "data.eval_prompts=0", "ppo.iterations=1")
    result = demo(tmp_path / "demo", *words)
    assert result.exit_code == 0, result.exception
    assert "true reward after PPO" in result.stdout


def test_a_dry_run_shows_all_stages_and_writes_nothing(tmp_path: Path):
    result = demo(tmp_path / "demo", "--dry-run")
    assert result.exit_code == 0
    for stage in ("train-rm", "fit-function", "train-ppo"):
        assert f"# stage: {stage} (start)" in result.stdout
    assert list(tmp_path.iterdir()) == []
