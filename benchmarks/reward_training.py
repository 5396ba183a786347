"""Reward-model training beside TRL's RewardTrainer: real tokens a second, same model, same batch.

    python benchmarks/reward_training.py --tokenizer DIR --pairs train.jsonl --out runs/rm-speed \
        [--rounds 3] [--steps 30] [--model DIR] [--batch 8] [--longest 1024] [--only NAME ...]

A Llama of 4 layers and hidden size 256 with random weights, or a model that is named, learns from
preference pairs of uneven lengths, 8 pairs a step. The ways take turns, each in a process of its
own; the first steps of each do not count, nor does starting. Tokens are real ones, never padding.
Segments come from a pass of a reference model, which a first run makes and keeps on disk and a
second one finds there. TRL is installed the first time, into an environment of its own; where that
fails its rows say why.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.peers import Unavailable, measured, python_of
from benchmarks.small import save_model

TRL = "trl-1.16.0"
LIMIT = 1024
PLAIN = {"bf16": False, "gradient_checkpointing": False}
GROUPED = {
    "train_sampling_strategy": "group_by_length",
    "length_column_name": "length",
    "remove_unused_columns": False,
}
PEERS: dict[str, dict[str, Any]] = {
    "TRL, defaults": {},
    "TRL, float32, no checkpointing": PLAIN,
    "TRL, the same, lengths grouped": {**PLAIN, **GROUPED},
    "TRL, bfloat16, lengths grouped": {**PLAIN, **GROUPED, "bf16": True},
}
OURS: dict[str, Any] = {
    "denserl, bandit": ("bandit", "float32", False),
    "denserl, bandit, padded": ("bandit", "float32", False, False),
    "denserl, segment, first run": ("segment", "float32", False),
    "denserl, segment, segments kept": ("segment", "float32", True),
    "denserl, bandit, bfloat16": ("bandit", "bfloat16", False),
    "denserl, bandit, bfloat16, padded": ("bandit", "bfloat16", False, False),
    "denserl, segment, bfloat16, first run": ("segment", "bfloat16", False),
    "denserl, segment, bfloat16, segments kept": ("segment", "bfloat16", True),
}
RUN = """
import json, os, resource, sys, time
if os.environ.get("CPU_TIME"):
    time.perf_counter = time.process_time
from denserl_cli.app import main
sys.argv = json.loads(os.environ["OWN"])
try:
    main()
except SystemExit as end:
    assert not end.code
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
"""The command in a process that prints its own peak of memory, in KiB."""


def main() -> None:
    """Measure in turns and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--pairs", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--limit", type=int, default=2000, help="pairs that are read")
    parser.add_argument("--model", help="folder of a model to train instead of the small one")
    parser.add_argument("--batch", type=int, default=8, help="pairs of a step")
    parser.add_argument("--longest", type=int, default=LIMIT, help="most tokens of a sequence")
    parser.add_argument("--warmup", type=int, default=3, help="first steps, which do not count")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument(
        "--only",
        nargs="+",
        default=[*PEERS, *OURS],
        metavar="NAME",
        choices=[*PEERS, *OURS],
        help="rows of the table; default: all",
    )
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="one thread, and its own CPU time: for a machine that has other work to do",
    )
    parser.add_argument("--quick", action="store_true", help="small numbers, to see that it works")
    asked = parser.parse_args()
    if asked.quick:
        asked.rounds, asked.steps, asked.limit, asked.hidden, asked.layers = 1, 6, 200, 32, 2
    if asked.cpu_time:
        os.environ["OMP_NUM_THREADS"] = "1"
    asked.out.mkdir(parents=True, exist_ok=True)
    asked.out = asked.out.absolute()
    if asked.model is None:
        asked.model = str(asked.out / "model")
        save_model(asked.tokenizer, asked.out / "model", hidden=asked.hidden, layers=asked.layers)
    make_data(asked)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in asked.only}
    for turn in range(asked.rounds):
        for name, rounds in found.items():
            rounds.append(peer(asked, PEERS[name]) if name in PEERS else own(asked, *OURS[name]))
            print(name, rounds[-1], file=sys.stderr, flush=True)
        print(f"round {turn + 1} of {asked.rounds}", file=sys.stderr, flush=True)
    (asked.out / "results.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(table(found))


def make_data(asked: argparse.Namespace) -> None:
    """Pairs that no way cuts or leaves out: both sides within the limit."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(asked.tokenizer)
    kept = []
    with asked.pairs.open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            sizes = [
                len(tokenizer.apply_chat_template(row[side], return_dict=False))
                for side in ("chosen", "rejected")
            ]
            if max(sizes) < asked.longest:
                two = {side: row[side] for side in ("chosen", "rejected")}
                kept.append(json.dumps({**two, "length": max(sizes)}) + "\n")
            if len(kept) == asked.limit:
                break
    (asked.out / "pairs.jsonl").write_text("".join(kept), encoding="utf-8")


def peer(asked: argparse.Namespace, options: dict[str, Any]) -> dict[str, Any]:
    """TRL's tokens and seconds, or why there are none."""
    case = {
        "model": asked.model,
        "pairs": str(asked.out / "pairs.jsonl"),
        "out": str(asked.out / "trl"),
        "batch": asked.batch,
        "steps": asked.steps,
        "options": options,
        "cpu_time": asked.cpu_time,
    }
    try:
        found = measured(python_of(TRL), "peer_trl_reward.py", case)
    except Unavailable as reason:
        return {"skipped": str(reason)}
    tokens, seconds = (sum(found[one][asked.warmup :]) for one in ("tokens", "seconds"))
    real = sum(found["tokens"]) / sum(found["padded"])
    return {"tokens_per_second": tokens / seconds, "real": real, "peak_mib": found["peak_mib"]}


def own(
    asked: argparse.Namespace,
    granularity: str,
    dtype: str,
    kept: bool,
    packing: bool | None = None,
) -> dict[str, Any]:
    """Denserl's tokens and seconds, through the command. kept: the segments of an earlier run."""
    cache = asked.out / f"cache-{dtype}"
    if not kept:
        shutil.rmtree(cache / "segments", ignore_errors=True)
    elif not (cache / "segments").exists():
        own(asked, granularity, dtype, kept=False)
    recipe, run = asked.out / f"{granularity}.yaml", asked.out / f"run-{granularity}"
    cutoff = {"cutoff": 5.0} if granularity == "segment" else {}
    settings = {
        "model": {
            "path": asked.model,
            "gradient_checkpointing": False,
            "dtype": dtype,
            "packing": packing,
        },
        "segmentation": {"granularity": granularity, **cutoff},
        "data": {
            "preferences": [str(asked.out / "pairs.jsonl")],
            "eval_pairs": 0,
            "max_length": LIMIT + 16,
            "max_prompt_length": LIMIT - 16,
        },
        "reward_model": {
            "epochs": asked.batch * (asked.steps + 0.5) / len(_lines(asked.out / "pairs.jsonl")),
            "batch_size": asked.batch,
            "micro_batch_size": asked.batch,
            "learning_rate": 1e-4,
        },
        "run": {"log_samples": 0},
    }
    recipe.write_text(yaml.safe_dump(settings), encoding="utf-8")
    shutil.rmtree(run, ignore_errors=True)
    words = ["denserl", "train-rm", "--recipe", str(recipe), "--out", str(run)]
    environment = {**os.environ, "DENSERL_CACHE": str(cache), "OWN": json.dumps(words)}
    environment |= {"CPU_TIME": "yes"} if asked.cpu_time else {}
    done = subprocess.run(
        [sys.executable, "-c", RUN], check=True, stdout=subprocess.PIPE, env=environment
    )
    steps = [json.loads(line) for line in _lines(run / "metrics.jsonl")][asked.warmup :]
    seconds = sum(step["seconds"] for step in steps)
    tokens = sum(step["seconds"] * step["tokens_per_second"] for step in steps)
    peak = int(done.stdout.split()[-1]) / 1024
    return {"tokens_per_second": tokens / seconds, "peak_mib": peak}


def _lines(file: Path) -> list[str]:
    return file.read_text(encoding="utf-8").splitlines()


def table(found: dict[str, list[dict[str, Any]]]) -> str:
    """Medians over the rounds, and how many times each way is as fast as each way of TRL."""
    speed = {
        name: statistics.median(one["tokens_per_second"] for one in rounds)
        for name, rounds in found.items()
        if all("tokens_per_second" in one for one in rounds)
    }
    peers = [name for name in PEERS if name in speed]
    heads = ["", "peak, MiB", "tokens a second", *(f"× {name}" for name in peers)]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for name, rounds in found.items():
        if name not in speed:
            reason = rounds[0]["skipped"]
            lines.append(f"| {name} | – | skipped: {reason} |" + " – |" * len(peers))
            continue
        ratios = "".join(f" {speed[name] / speed[other]:.2f} |" for other in peers)
        peak = statistics.median(one["peak_mib"] for one in rounds)
        lines.append(f"| {name} | {peak:.0f} | {speed[name]:.0f} |{ratios}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
