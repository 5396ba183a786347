"""The pretended GPU notices tensors on two devices, counts waits, and replays graphs.

Whole stages run on it by `python -m tests.pretend_gpu_worker`, see its top.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT
from tests.pretend_gpu import environment

pytestmark = pytest.mark.skipif(
    not (shutil.which("c++") and sys.platform == "linux"), reason="needs a C++ compiler and Linux"
)


def test_faults_waits_and_graphs_are_what_they_would_be_on_a_gpu(tmp_path: Path):
    words = [sys.executable, "-m", "tests.pretend_gpu_worker", str(tmp_path / "runs")]
    done = subprocess.run(
        words, capture_output=True, text=True, env=environment(tmp_path), cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-3000:]
