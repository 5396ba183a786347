"""Models loaded in shards, and shards that another number of processes goes on with."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import ROOT, tiny

WORKER = Path(__file__).with_name("loading_worker.py")

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """Saved models: one as it should be, one with tied weights, one with a NaN."""
    for name in ("good", "tied", "damaged"):
        model = tiny.causal_lm(0, tied=name == "tied")
        if name == "damaged":
            with torch.no_grad():
                model.model.norm.weight[-1] = torch.nan
        model.save_pretrained(tmp_path / name)
    return tmp_path


def run(work: str, models: Path, processes: int) -> None:
    """Let so many processes do one of the worker's works."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [sys.executable, *launcher, str(WORKER), work, str(models), str(models)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-5000:]


def test_each_process_loads_its_share_and_computes_what_a_whole_model_does(models: Path):
    run("load", models, 3)


def test_another_number_of_processes_goes_on_from_the_shards(models: Path):
    run("save", models, 2)
    run("resume", models, 3)
