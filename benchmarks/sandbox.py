"""What the stages reach on the embedded task: granularities × seeds, against its true reward.

    python benchmarks/sandbox.py --out runs/sandbox-seeds [--seeds 0 1 2] [--jobs 2] [--quick]

Every run is the shipped recipe with another seed, started through the commands as a user would; a
run that is finished is not done again. Prints a Markdown table and writes it to OUT/report.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from denserl_cli.core.recipe import load_recipe
from denserl_cli.core.recipe.schema import SandboxConfig
from denserl_cli.core.sandbox.task import Task, boundary_agreement

STAGES = ("train-rm", "fit-function", "train-ppo")
LAST = 10
QUICK = ("sandbox.pairs=400", "sandbox.fit_steps=60", "ppo.iterations=4")


def main() -> None:
    """Run the grid and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--granularities", nargs="+", default=["segment", "token", "bandit"])
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    grid = [(g, seed) for g in arguments.granularities for seed in arguments.seeds]
    settings = QUICK if arguments.quick else ()
    with ThreadPoolExecutor(arguments.jobs) as pool:
        rows = list(pool.map(lambda cell: run(arguments.out, *cell, settings), grid))
    report(rows, arguments.out / "report.md")


def run(out: Path, granularity: str, seed: int, settings: tuple[str, ...]) -> list[object]:
    """One full pipeline; returns its row of the table."""
    folder = out / f"{granularity}-{seed}"
    options = ["--recipe", f"sandbox-{granularity}", "--out", str(folder), "--set", f"seed={seed}"]
    options += [word for setting in settings for word in ("--set", setting)]
    for stage in STAGES:
        denserl(stage, *options, "--resume")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    ppo = [line for line in lines if line["stage"] == "train-ppo"]
    reward = [line for line in lines if line["stage"] == "train-rm"][-1]
    trained = ppo[1:][-LAST:]  # the first line is the evaluation before training
    found = boundaries(granularity, seed, options) if granularity == "segment" else ("–", "–")
    return [
        granularity,
        seed,
        reward["eval_accuracy"],
        *found,
        ppo[0]["eval_true_reward"],
        ppo[-1]["eval_true_reward"],
        np.mean([line["true_reward"] for line in trained]),
        np.mean([line["kl"] for line in trained]),
        np.mean([line["response_length"] for line in trained]),
        Task(SandboxConfig(), seed).best,
    ]


def boundaries(granularity: str, seed: int, options: list[str]) -> tuple[float, float]:
    """Precision and recall of the segment ends against the true phrase boundaries."""
    shown = json.loads(denserl("segment", *options, "--limit", "100", "--json"))
    config = load_recipe(f"sandbox-{granularity}").sandbox
    assert config is not None
    responses = [
        (
            " ".join(segment["text"].strip() for segment in response["segments"]),
            [segment["end"] for segment in response["segments"]],
        )
        for response in shown["responses"]
    ]
    return tuple(boundary_agreement(Task(config, seed), responses))


def denserl(*words: str) -> str:
    """Run one denserl command on one core; returns what it printed."""
    line = [sys.executable, "-m", "denserl_cli.app", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return done.stdout


def report(rows: list[list[object]], file: Path) -> None:
    """Write the table and print it."""
    names = (
        "granularity | seed | RM accuracy | boundary precision | recall | true reward, start "
        f"| end | mean of the last {LAST} iterations | KL | response tokens | best possible"
    )
    lines = [f"| {names} |", "|" + "---|" * len(rows[0])]
    for row in rows:
        cells = (f"{value:.3g}" if isinstance(value, float) else str(value) for value in row)
        lines.append("| " + " | ".join(cells) + " |")
    text = "\n".join(lines) + "\n"
    file.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
