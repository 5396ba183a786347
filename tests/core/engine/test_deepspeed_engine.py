"""DeepSpeed trains the same weights as plain torch, whatever is sharded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import ROOT
from tests.core.engine.deepspeed_worker import train

WORKER = Path(__file__).with_name("deepspeed_worker.py")

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")


def run(out: Path, processes: int, tied: str) -> dict:
    """What a small training ends with for each ZeRO stage, in so many processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [sys.executable, *launcher, str(WORKER), tied, str(out)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out, weights_only=True)


@pytest.mark.parametrize(("tied", "processes"), [("untied", 2), ("tied", 1)])
def test_every_stage_trains_what_plain_torch_trains(tied: str, processes: int, tmp_path: Path):
    plain = train("torch", 0, tied == "tied")
    for found in run(tmp_path / "deepspeed", processes, tied).values():
        for name in ("losses", "norms", "rates"):
            torch.testing.assert_close(found[name], plain[name], rtol=1e-5, atol=1e-6)
        for name, value in plain["weights"].items():
            # Adam turns a rounding of the gradient into a share of the learning rate
            assert (found["weights"][name] - value).abs().max() < 0.05 * plain["rates"].max()
        for name in ("generated", "sampled"):
            assert found[name].tolist() == plain[name].tolist()
