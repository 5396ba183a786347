"""Two processes update a policy as one does, in every mode."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import ROOT
from tests.core.ppo.conftest import made_up_rollout
from tests.core.ppo.modes_worker import MODES, update

WORKER = Path(__file__).with_name("modes_worker.py")

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What two processes found."""
    out = tmp_path_factory.mktemp("modes") / "found"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [sys.executable, *launcher, str(WORKER), str(out)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        timeout=300,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = torch.load(out, weights_only=True)
    return found


@pytest.mark.parametrize("mode", list(MODES))
def test_two_processes_update_as_one(mode: str, together: dict[str, Any]):
    alone, found = update(MODES[mode], "torch", made_up_rollout()), together[mode]
    assert found["metrics"].keys() == alone["metrics"].keys()
    assert found["metrics"] == pytest.approx(alone["metrics"], rel=1e-4, abs=1e-6)
    for name, value in alone["weights"].items():
        # Adam turns a rounding of the gradient into a share of the learning rate, 1e-3
        assert (found["weights"][name] - value).abs().max() < 5e-5
    assert (any(name.startswith("value") for name in found["metrics"])) == MODES[mode].has_critic
