"""What several tests share."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: there is a worker for each core
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before its library: no test waits for a network
from tests import SHARED, tiny

LONGEST = (
    "test_torchrun.py",
    "test_errors_of_processes.py",
    "test_deepspeed_engine.py",
    "test_sharding.py",
    "test_pretend_gpu.py",
)
"""Few tests that start processes: pytest-xdist would keep these files for the end."""


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Encoded data of tests go to a folder of theirs, also those of the processes they start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DENSERL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that no process is left alone with one of them."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture
def shared() -> Path:
    """Recorded numbers, real tokenizers and real data; tests that need them skip without."""
    if not SHARED.is_dir():
        pytest.skip(f"no shared fixtures at {SHARED}")
    return SHARED


@pytest.fixture(scope="session")
def _scored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scored") / "run"
    tiny.make_run(folder)
    return folder


@pytest.fixture
def scored(_scored: Path, tmp_path: Path) -> Path:
    """A run of `tiny.recipe()` that has a reward model and a normaliser, and is yours to change."""
    return Path(shutil.copytree(_scored, tmp_path / "scored"))
