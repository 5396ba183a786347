"""The page's script computes the rewards that `core/ppo/rewards.py` does, case by case.

`segment_rewards.json` holds the cases. After a change of the method's arithmetic, write it anew:

    python -m tests.pages.test_segments_script
"""

from __future__ import annotations

import json
import shutil
import subprocess
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from denserl_cli.core.inspection.traces import Cut, Trace
from denserl_cli.core.normalizer import LocationNormalizer
from denserl_cli.core.recipe.resolved import as_resolved
from denserl_cli.pages.inspector import described_view
from tests import ROOT, tiny

FILE = Path(__file__).with_name("segment_rewards.json")
SCRIPT = ROOT / "denserl_cli" / "pages" / "segments.js"
ENTROPY = [0.5, 2.0, 0.5, 3.0, 0.1, 1.5, 0.0]
VALUES = [0.25, -1.5, 3.0, 0.75, 2.5, -0.5, 4.0]


def cases() -> list[dict[str, Any]]:
    """Every way to make rewards of values, with and without a normaliser, and what comes of it."""
    made = []
    ways = product(
        ("even", "repeat", "end"),
        ("sum", "mean", "softmin"),
        (True, False),
        (0.4, 10.0),
        (True, False),
    )
    for interpolation, total, by_length, clip, normalized in ways:
        settings = {
            "segmentation.cutoff": "1.0",
            "ppo.interpolation": interpolation,
            "ppo.segment_total": total,
            "ppo.length_normalize": str(by_length).lower(),
            "ppo.reward_clip": clip,
            "ppo.softmin_temperature": 0.7,
            "ppo.rewards": "[{source: values, weight: 0.5}]",
            "normalizer.kind": "location" if normalized else "none",
        }
        recipe = tiny.recipe(*(f"{key}={value}" for key, value in settings.items()))
        normalizer = LocationNormalizer(0.2, 0.3, 0.1, 1.5) if normalized else None
        cut = Cut.of(as_resolved(recipe, knows_true_reward=False), normalizer)
        texts = [f" w{j}" for j in range(len(VALUES))]
        trace = Trace(
            *("t", "", "p", True, texts, np.zeros(len(VALUES), dtype=bool)),
            np.array(ENTROPY, np.float32),
            np.array(VALUES, np.float32),
        )
        found = cut(trace)
        made.append(
            {
                "view": described_view("case", cut),
                "rewards": [[s.start, s.end, s.reward, s.per_token] for s in found.segments],
                "score": found.score,
            }
        )
    return made


def assert_alike(found: list[list[float | None]], expected: list[list[float | None]]) -> None:
    """The same numbers, and null in the same places."""
    for pair in zip(found, expected, strict=True):
        for one, other in zip(*pair, strict=True):
            assert one is other is None or one == pytest.approx(other, rel=1e-5, abs=1e-7)


def test_the_cases_are_what_the_package_computes():
    kept = json.loads(FILE.read_text(encoding="utf-8"))
    for old, new in zip(kept["cases"], json.loads(json.dumps(cases())), strict=True):
        assert old["view"] == new["view"]
        assert old["score"] == pytest.approx(new["score"])
        assert_alike(old["rewards"], new["rewards"])


def test_the_script_computes_them_as_well():
    node = shutil.which("node")
    if node is None:
        pytest.skip("node, which runs the page's script, is not installed")
    program = (
        f"{SCRIPT.read_text(encoding='utf-8')}\n"
        "const kept = JSON.parse(require('fs').readFileSync(process.argv[1], 'utf-8'));\n"
        "console.log(JSON.stringify(kept.cases.map(({view}) => {\n"
        "  const parts = denserl.segments(kept.trace, view, view.cutoff);\n"
        "  return {score: denserl.score(parts, view.aggregate),\n"
        "    rewards: parts.map((s) => [s.start, s.end, s.reward, s.perToken])};\n"
        "})));"
    )
    done = subprocess.run(
        [node, "-e", program, str(FILE)], capture_output=True, text=True, check=True
    )
    expected = json.loads(FILE.read_text(encoding="utf-8"))["cases"]
    for found, case in zip(json.loads(done.stdout), expected, strict=True):
        assert found["score"] == pytest.approx(case["score"])
        assert_alike(found["rewards"], case["rewards"])


def write() -> None:
    """Write the cases anew."""
    trace = {
        "sizes": [3] * len(VALUES),
        "terminated": True,
        "entropy": ENTROPY,
        "values": VALUES,
        "ends": [],
    }
    text = json.dumps({"trace": trace, "cases": cases()}, indent=1)
    FILE.write_text(f"{text}\n", encoding="utf-8")


if __name__ == "__main__":
    write()
