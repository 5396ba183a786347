"""Does the cost stay flat? Per token in batch and data size, and in memory over 200 PPO iterations.

    python benchmarks/scale.py --out runs/scale [--rounds 3] [--quick]

batch: tokens a second of a training pass of a small reward model, with more and more pairs of one
length in the batch. data: milliseconds a step to choose, sort and collate batches out of 1,000 to
700,000 synthetic pairs of uneven lengths. memory: the resident set of train-ppo on the embedded
task, read from outside while it runs.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from denserl_cli.core.data.arrow_rows import PairRows, sequences_of
from denserl_cli.core.data.batches import (
    EncodedPairRow,
    collate_sides,
    forward_passes,
    global_batches,
    pair_batches,
)
from denserl_cli.core.models.scalar_head import token_values
from denserl_cli.core.reward_model.loss import preference_loss

BATCHES, LENGTH = (4, 8, 16, 32, 64), 128
DATA, STEPS = (1_000, 10_000, 100_000, 700_000), 100
ITERATIONS = 200


def main() -> None:
    """Print the three tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="small numbers, to see that it works")
    asked = parser.parse_args()
    quick = asked.quick
    print("| pairs a batch | tokens a second |\n|---|---|")
    for pairs, speed in batch_sizes(BATCHES[:2] if quick else BATCHES, asked.rounds).items():
        print(f"| {pairs} | {speed:.0f} |", flush=True)
    print("\n| pairs of data | milliseconds a step |\n|---|---|")
    for pairs, seconds in data_sizes(DATA[:2] if quick else DATA, asked.rounds).items():
        print(f"| {pairs:,} | {1e3 * seconds:.2f} |", flush=True)
    print("\n| PPO iteration | resident, MiB |\n|---|---|")
    for iteration, size in memory(asked.out, 10 if quick else ITERATIONS):
        print(f"| {iteration} | {size / 2**20:.0f} |", flush=True)


def batch_sizes(sizes: tuple[int, ...], rounds: int) -> dict[int, float]:
    """Tokens a second, forward and backward, by pairs in the batch."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(0)
    shape = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    config = LlamaConfig(vocab_size=32_064, num_labels=1, pad_token_id=0, **shape, **heads)
    model = LlamaForSequenceClassification(config)

    def train(pairs: int) -> None:
        held = rows(pairs, np.full((pairs, 3), LENGTH // 2))
        batch = collate_sides(held, range(2 * pairs), 0)
        chosen, rejected = token_values(model, batch).sum(1).chunk(2)
        preference_loss(chosen, rejected).backward()

    taken = in_turns({size: lambda size=size: train(size) for size in sizes}, rounds)
    return {size: 2 * size * LENGTH / seconds for size, seconds in taken.items()}


def data_sizes(sizes: tuple[int, ...], rounds: int) -> dict[int, float]:
    """Seconds to make one step's micro-batches, by the number of pairs there are."""
    rng = np.random.default_rng(0)
    work = {}
    for size in sizes:
        lengths = rng.lognormal(3, 0.7, size=(size, 3)).astype(int) + 1
        held = PairRows.of(rows(size, lengths))
        batches = global_batches(size, 64, steps=STEPS, seed=0)
        sides = sequences_of(held).lengths.reshape(2, -1)

        def steps(held=held, batches=batches, sides=sides) -> None:  # type: ignore[no-untyped-def]
            for indices in batches:
                for part in pair_batches(sides[:, indices].sum(0), indices, 8):
                    pairs = [held[int(i)] for i in part]
                    for numbers in forward_passes(sides[:, part].ravel()):
                        collate_sides(pairs, numbers, 0)

        work[size] = steps
    return {size: seconds / STEPS for size, seconds in in_turns(work, rounds).items()}


def memory(out: Path, iterations: int) -> list[tuple[int, int]]:
    """Resident bytes of train-ppo at some of its iterations."""
    run = out / "run"
    shutil.rmtree(run, ignore_errors=True)
    settings = {
        "sandbox.response_phrases": 6,
        "sandbox.pairs": 200,
        "sandbox.fit_steps": 60,
        "ppo.rollout.max_new_tokens": 48,
        "ppo.rollout.batch_size": 16,
        "ppo.rollout.samples_per_prompt": 1,
        "ppo.iterations": iterations,
        "normalizer.pairs": 100,
    }
    words = [f"{name}={value}" for name, value in settings.items()]
    options = [word for setting in words for word in ("--set", setting)]
    command = [sys.executable, "-m", "denserl_cli.app"]
    for stage in ("train-rm", "fit-function"):
        arguments = [stage, "--recipe", "sandbox-segment", "--out", str(run), *options]
        subprocess.run([*command, *arguments], check=True, capture_output=True)
    arguments = ["train-ppo", "--recipe", "sandbox-segment", "--out", str(run), *options]
    job = subprocess.Popen(
        [*command, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    wanted = sorted({max(1, iterations * part // 10) for part in (1, 2, 4, 6, 8, 9)})
    found: list[tuple[int, int]] = []
    while job.poll() is None and len(found) < len(wanted):
        time.sleep(0.05)
        step = last_step(run / "metrics.jsonl")
        if step >= wanted[len(found)]:
            found.append((step, resident(job.pid)))
    if job.wait():
        raise SystemExit("train-ppo failed")
    return found


def last_step(file: Path) -> int:
    """The last iteration in the log."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    steps = [json.loads(line) for line in lines[-1:] if line.endswith("}")]
    return max((one["step"] for one in steps if one["stage"] == "train-ppo"), default=-1)


def resident(pid: int) -> int:
    """Resident bytes of a process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


def rows(count: int, lengths: np.ndarray) -> list[EncodedPairRow]:
    """Pairs of random tokens. lengths: (count, 3) of prompt, chosen and rejected response."""
    rng = np.random.default_rng(0)
    ids = rng.integers(1, 32_000, size=int(lengths.max()) + 1).astype(np.int32)
    return [EncodedPairRow(ids[:p], ids[:c], ids[:r], None, "here:1") for p, c, r in lengths]


def in_turns(work: dict[int, Callable[[], None]], rounds: int) -> dict[int, float]:
    """Median seconds of each, which take turns; the first round does not count."""
    times: dict[int, list[float]] = {name: [] for name in work}
    for _ in range(rounds + 1):
        for name, one in work.items():
            began = time.perf_counter()
            one()
            times[name].append(time.perf_counter() - began)
    return {name: statistics.median(rounds[1:]) for name, rounds in times.items()}


if __name__ == "__main__":
    main()
