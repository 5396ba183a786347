"""How long the command line takes to answer, and a job to its first step.

    python benchmarks/startup.py --tokenizer DIR --pairs train.jsonl --out runs/startup \
        [--rounds 5] [--quick]

The job is train-rm with a small model on a few pairs; its first step begins when everything is
loaded. Beside it stand the bare imports and loads that it cannot do without: torch, transformers,
the tokenizer, and the starting model twice, as language model and with a scalar head. Medians of
whole processes that take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.small import save_model

BARE = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
AutoTokenizer.from_pretrained(sys.argv[1])
AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
AutoModelForSequenceClassification.from_pretrained(sys.argv[1], dtype=torch.float32, num_labels=1)
"""


def main() -> None:
    """Measure in turns and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--pairs", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one round")
    asked = parser.parse_args()
    asked.rounds = 1 if asked.quick else asked.rounds
    asked.out.mkdir(parents=True, exist_ok=True)
    asked.out = asked.out.absolute()
    recipe = prepare(asked)
    ways = {
        "`denserl --help`": lambda: command(asked, "--help"),
        "`denserl recipes list`": lambda: command(asked, "recipes", "list"),
        "bare imports and loads": lambda: bare_loads(asked),
        "`denserl train-rm` to its first step": lambda: first_step(asked, recipe),
    }  # fmt: skip
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(asked.rounds + 1):
        for name, way in ways.items():
            times[name].append(way())
    taken = {name: statistics.median(rounds[1:]) for name, rounds in times.items()}
    bare = taken["bare imports and loads"]
    print("| | seconds | times the bare loads |\n|---|---|---|")
    for name, seconds in taken.items():
        print(f"| {name} | {seconds:.2f} | {seconds / bare:.2f} |")


def prepare(asked: argparse.Namespace) -> Path:
    """A small model, a hundred pairs and a recipe; returns the recipe."""
    save_model(asked.tokenizer, asked.out / "model")
    source = {"path": str(asked.pairs.absolute()), "max_samples": 100}
    settings = {
        "model": {"path": str(asked.out / "model"), "gradient_checkpointing": False},
        "segmentation": {"cutoff": 5.0},
        "data": {
            "preferences": [source],
            "eval_pairs": 0,
            "max_length": 128,
            "max_prompt_length": 64,
        },
        "reward_model": {"batch_size": 8, "epochs": 0.1},
        "run": {"log_samples": 0},
    }
    recipe: Path = asked.out / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return recipe


def command(asked: argparse.Namespace, *words: str) -> float:
    """Seconds that a denserl command takes."""
    return process([str(Path(sys.executable).with_name("denserl")), *words])


def bare_loads(asked: argparse.Namespace) -> float:
    """Seconds of the imports and loads alone."""
    return process([sys.executable, "-c", BARE, str(asked.out / "model")])


def process(words: list[str]) -> float:
    """Seconds of a whole process."""
    began = time.perf_counter()
    subprocess.run(
        words, check=True, capture_output=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    return time.perf_counter() - began


def first_step(asked: argparse.Namespace, recipe: Path) -> float:
    """Seconds from the start of train-rm to the beginning of its first step."""
    run = asked.out / "run"
    shutil.rmtree(run, ignore_errors=True)
    began = time.time()
    command(asked, "train-rm", "--recipe", str(recipe), "--out", str(run))
    file = run / "metrics.jsonl"
    (step,) = map(json.loads, file.read_text(encoding="utf-8").splitlines())
    return file.stat().st_mtime - step["seconds"] - began


if __name__ == "__main__":
    main()
