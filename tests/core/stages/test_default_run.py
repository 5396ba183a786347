"""Padded, the defaults train what they trained when this run was recorded, to the byte.

Rounding depends on processor and releases, so a digest is compared where it was recorded alone.
`python -m tests.core.stages.test_default_run` records anew, after a change that is meant to change
what the defaults train.
"""

from __future__ import annotations

import hashlib
import json
import platform
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from denserl_cli.core.observer import TIMES, Observer
from denserl_cli.core.recipe.stages import TRAINING
from denserl_cli.core.stages.run import run_stage
from tests import tiny

RECORD = Path(__file__).with_name("default_run.json")


def environment() -> dict[str, str]:
    """What rounding depends on."""
    models = Path("/proc/cpuinfo")
    lines = models.read_text().splitlines() if models.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "processor": names[0] if names else platform.processor(),
    }


def digests(folder: Path) -> dict[str, str]:
    """Of the models of a finished run, and of its metrics without what the clock says."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    metrics = [{key: one[key] for key in sorted(one) if key not in TIMES} for one in lines]
    found = {"metrics": hashlib.sha256(json.dumps(metrics).encode()).hexdigest()}
    for name in ("reward_model", "policy"):
        weights = (folder / name / "model.safetensors").read_bytes()
        found[name] = hashlib.sha256(weights).hexdigest()
    return found


def run(folder: Path) -> dict[str, Any]:
    """The whole pipeline of the tiny sandbox; packed sequences are summed up in another order."""
    recipe = tiny.recipe("model.packing=false")
    for stage in TRAINING:
        run_stage(stage, recipe, folder, "start", Observer())
    return digests(folder)


def test_the_defaults_train_what_they_trained(tmp_path: Path):
    recorded = json.loads(RECORD.read_text(encoding="utf-8"))
    if recorded["environment"] != environment():
        pytest.skip(f"recorded with {recorded['environment']}")
    assert run(tmp_path / "run") == recorded["digests"]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        made = {"environment": environment(), "digests": run(Path(folder) / "run")}
    RECORD.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
