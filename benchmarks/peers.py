"""Other libraries, each in an environment of its own with pinned versions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PEERS = ROOT / "runs" / "peers"
COMMON = ("torch==2.13.0", "accelerate==1.15.0", "datasets==5.2.0")
RELEASES = {
    "trl-1.16.0": ("trl==1.16.0", "transformers==5.23.0", *COMMON),
    "trl-1.12.0": ("trl==1.12.0", "transformers==5.23.0", *COMMON),
    "trl-0.24.0": ("trl==0.24.0", "transformers==4.57.3", "torch==2.13.0", "accelerate==1.12.0",
                   "datasets==4.4.1", "rich"),
}  # fmt: skip
"""What is installed beside each release: what denserl is tested with, or the newest that fits."""


class Unavailable(Exception):
    """A peer cannot be installed or does not run here; the message is the reason."""


def python_of(release: str) -> str:
    """The interpreter of a release's environment, which is made the first time."""
    folder = PEERS / release
    python = folder / "bin" / "python"
    done = folder / "installed"
    if not done.exists():
        print(f"installing {release} into {folder}", file=sys.stderr, flush=True)
        _succeed([sys.executable, "-m", "venv", "--clear", str(folder)])
        _succeed([str(python), "-m", "pip", "install", "--quiet", *RELEASES[release]])
        done.touch()
    return str(python)


def measured(python: str, script: str, case: dict[str, Any]) -> Any:
    """Run one of our scripts with a case; returns what it prints last, as JSON."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
                   "PYTHONPATH": str(ROOT)}  # fmt: skip
    script = str(Path(__file__).parent / script)
    return json.loads(_succeed([python, script, json.dumps(case)], environment).splitlines()[-1])


def _succeed(command: Sequence[str], environment: dict[str, str] | None = None) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode < 0:
        raise Unavailable(f"ended by signal {-done.returncode}")
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise Unavailable(lines[-1])
    return done.stdout
