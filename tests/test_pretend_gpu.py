"""Whole stages on a pretended GPU: no tensor on the wrong device, few waits of the host."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import ROOT
from tests.pretend_gpu import environment
from tests.pretend_gpu_worker import CASES

PARTS = (
    ("resumed", "checkpointing, frozen models offloaded", "lora", "own rewards"),
    ("token", "bandit", "quantile", "fixed", "random", "newline"),
    ("zero 1", "zero 2", "zero 3"),
)
"""Cases that share a process."""

TOKEN = 0.5
"""Waits of the host for each pass of the model in sampling: it looks every 16 tokens."""
STEP = {"train-rm": 10, "fit-function": 0, "train-ppo": 100}
"""Waits in a step of train-rm and in an iteration of train-ppo with two steps of both models, of
which rewards of one's own take some 30 for the texts of four responses."""
DEEPSPEED = 50
"""More of them under DeepSpeed, which takes each norm to the host."""

pytestmark = pytest.mark.skipif(
    not (shutil.which("c++") and sys.platform == "linux"), reason="needs a C++ compiler and Linux"
)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return environment(tmp_path_factory.mktemp("library"))


def found(part: tuple[str, ...], folder: Path, library: dict[str, str]) -> dict[str, Any]:
    """What the worker says of some cases."""
    words = [sys.executable, "-m", "tests.pretend_gpu_worker", str(folder), *part]
    done = subprocess.run(words, capture_output=True, text=True, env=library, cwd=ROOT)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == len(part), done.stderr[-3000:]
    return {line["case"]: line for line in lines}


def test_every_case_is_run():
    assert sorted(case for part in PARTS for case in part) == sorted(CASES)


@pytest.mark.parametrize("part", PARTS, ids=["settings", "cuts", "deepspeed"])
def test_no_device_fault_and_few_waits(
    part: tuple[str, ...], tmp_path: Path, library: dict[str, str]
):
    for case, line in found(part, tmp_path, library).items():
        assert "failed" not in line, f"{case}: {line['failed']}"
        sampling = line["sampling"]
        assert sampling["passes"] > 20
        assert sampling["waits"] <= TOKEN * sampling["passes"], (case, sampling)
        for stage, most in STEP.items():
            most += DEEPSPEED * case.startswith("zero")
            assert sum(line[stage].values()) <= most, (case, stage, line[stage])
