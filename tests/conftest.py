"""What several tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture
def shared() -> Path:
    """Recorded numbers, real tokenizers and real data; tests that need them skip without."""
    if not SHARED.is_dir():
        pytest.skip(f"no shared fixtures at {SHARED}")
    return SHARED
