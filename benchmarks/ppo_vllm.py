"""PPO on the embedded task, sampled by torch and by vLLM: the true reward that each reaches.

    python benchmarks/ppo_vllm.py --out runs/ppo-vllm [--seeds 0 1 2] [--iterations 40] [--quick]

Reward model and normaliser of a seed are made once, and both engines start from them; vLLM's random
numbers are others than torch's, so the seeds' spread says what a difference means. Runs in the
environment of `make test-vllm`, which is made the first time. A run that is finished is not done
again. Prints a Markdown table and writes it to OUT/report.md.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.rollout_vllm import in_environment_with_vllm

ENGINES = {
    "torch": (),
    "vllm": ("ppo.rollout.engine=vllm", "ppo.rollout.memory_share=0.1", "ppo.rollout.rows=64"),
}
HEADS = ("sandbox.heads=2",)
"""vLLM's attention on a CPU has no head size of 16, the task's own."""
QUICK = ("sandbox.pairs=400", "sandbox.fit_steps=60")
LAST = 10


def main() -> None:
    """Train every seed by both engines and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--iterations", type=int, default=40)
    parser.add_argument("--quick", action="store_true")
    asked = parser.parse_args()
    in_environment_with_vllm()
    settings = [*HEADS, f"ppo.iterations={asked.iterations}", *(QUICK if asked.quick else ())]
    rows = [run(asked.out, seed, engine, settings) for seed in asked.seeds for engine in ENGINES]
    table = report(rows)
    print(table)
    (asked.out / "report.md").write_text(table + "\n")


def run(out: Path, seed: int, engine: str, settings: list[str]) -> dict[str, Any]:
    """One policy; returns what it reached."""
    scored, folder = out / f"{seed}-scored", out / f"{seed}-{engine}"
    common = [f"seed={seed}", *settings]
    for stage in ("train-rm", "fit-function"):
        denserl(stage, scored, common)
    if not folder.exists():
        shutil.copytree(scored, folder)
    denserl("train-ppo", folder, [*common, *ENGINES[engine]])
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    ppo = [line for line in lines if line["stage"] == "train-ppo"]
    last = ppo[1:][-LAST:]  # the first line is the evaluation before training
    return {
        "seed": seed,
        "engine": engine,
        "start": ppo[0]["eval_true_reward"],
        "end": ppo[-1]["eval_true_reward"],
        **{
            name: float(np.mean([line[name] for line in last]))
            for name in ("true_reward", "kl", "response_length")
        },
        "mismatch": float(np.mean([line.get("mismatch_kl", 0.0) for line in last])),
    }


def denserl(stage: str, folder: Path, settings: list[str]) -> None:
    """Run a stage as a user would; what is finished stays as it is."""
    words = [word for setting in settings for word in ("--set", setting)]
    command = [sys.executable, "-m", "denserl_cli.app", stage, "--recipe", "sandbox-segment"]
    done = subprocess.run(
        [*command, "--out", str(folder), *words, "--resume"], capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{stage} in {folder}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def report(rows: list[dict[str, Any]]) -> str:
    """A row a run, then the means and the spread over the seeds of each engine."""
    names = ("start", "end", "true_reward", "kl", "response_length", "mismatch")
    lines = [
        "| seed | engine | held-out before | held-out after | true reward, last "
        f"{LAST} | KL | tokens | mismatch KL |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        figures = " | ".join(f"{row[name]:.3g}" for name in names)
        lines.append(f"| {row['seed']} | {row['engine']} | {figures} |")
    for engine in ENGINES:
        found = [row["true_reward"] for row in rows if row["engine"] == engine]
        lines.append("")
        lines.append(
            f"{engine}: true reward {np.mean(found):.3f}, from {min(found):.3f} to "
            f"{max(found):.3f} over {len(found)} seeds."
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
