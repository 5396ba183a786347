"""A second release of transformers, in processes of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

PINNED = ("transformers==4.57.6", "tokenizers==0.22.2", "huggingface_hub==0.36.2", "requests")
"""What shadows the installed release; torch and all else are those of the tests."""

Reader = Callable[..., Any]


@pytest.fixture(scope="session")
def transformers_4(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    """Runs a program with transformers 4.57 and returns the JSON of its last line of output."""
    folder = tmp_path_factory.mktemp("transformers-4.57")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    offline = ["--retries", "0", "--timeout", "15"]
    installed = subprocess.run(
        [*pip, *offline, "--no-deps", "--target", str(folder), *PINNED],
        capture_output=True,
        text=True,
    )
    if installed.returncode != 0:
        pytest.skip(f"transformers 4.57 cannot be installed here: {installed.stderr[-300:]}")

    def run(program: str, *arguments: object) -> Any:
        done = subprocess.run(
            [sys.executable, "-c", program, *map(str, arguments)],
            env={**os.environ, "PYTHONPATH": str(folder), "TRANSFORMERS_VERBOSITY": "error"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])

    return run
