import sys
from pathlib import Path

import pytest
import yaml

from denserl_cli.core.errors import DenserlError
from denserl_cli.core.observer import Observer
from denserl_cli.core.recipe.schema import (
    ModelConfig,
    PPOConfig,
    Recipe,
    RewardModelConfig,
    RolloutConfig,
    SegmentationConfig,
)
from denserl_cli.launch import worker
from denserl_cli.launch.launcher import launch

RECIPE = Recipe(
    name="tiny",
    model=ModelConfig(path="a/b"),
    segmentation=SegmentationConfig(cutoff=1.0),
    reward_model=RewardModelConfig(batch_size=128, micro_batch_size=8),
    ppo=PPOConfig(
        rollout=RolloutConfig(batch_size=64, samples_per_prompt=4), train_batch_size=32, epochs=2
    ),
)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """What a worker was asked to do; this one fails when asked for `fit-function`."""
    record: list[tuple] = []

    def run_stage(stage, recipe, folder, mode, observer) -> None:
        record.append((stage, recipe, folder, mode, observer))
        observer.begin("work", total=2)
        observer.begin("inner work")
        if stage == "fit-function":
            raise DenserlError("no reward model")

    monkeypatch.setattr(worker, "run_stage", run_stage)
    return record


def test_a_stage_runs_in_its_folder(calls):
    launch("train-rm", RECIPE, out=None, mode="start", dry_run=False)
    launch("train-ppo", RECIPE, out=Path("x/y"), mode="resume", dry_run=False)
    assert [call[:4] for call in calls] == [
        ("train-rm", RECIPE, Path("runs/tiny"), "start"),
        ("train-ppo", RECIPE, Path("x/y"), "resume"),
    ]
    assert isinstance(calls[0][4], Observer)


def test_the_display_ends_with_a_stage_that_fails(calls):
    with pytest.raises(DenserlError, match="no reward model"):
        launch("fit-function", RECIPE, out=None, mode="start", dry_run=False)
    assert calls[0][4]._work == []


def test_a_dry_run_only_prints(calls, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["/bin/denserl", "train-ppo", "-r", "my tiny", "--dry-run"])
    launch("train-ppo", RECIPE, out=None, mode="fresh", dry_run=True)
    text = capsys.readouterr().out
    assert calls == [] and list(tmp_path.iterdir()) == []
    assert text.startswith("# stage: train-ppo (fresh)\n# run folder: ")
    assert f"# run folder: {tmp_path / 'runs' / 'tiny'}\n" in text
    assert "# command: denserl train-ppo -r 'my tiny'\n" in text
    assert yaml.safe_load(text)["ppo"]["rollout"]["batch_size"] == 64
