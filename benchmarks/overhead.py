"""What is not training: the share of logging, progress and samples in a step, and of checkpoints.

    python benchmarks/overhead.py --out runs/overhead [--quick]

train-rm and train-ppo run on the embedded task, in this process, with the progress of a log file.
Clocks around `RunFolder.log` and the observer say how much of all steps they take. A checkpoint of
random weights with Adam's state is compared with a plain write of as many bytes to the same disk,
flushed to it (`fsync`); the two take turns.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from denserl_cli.core.recipe import load_recipe
from denserl_cli.core.runs.checkpoints import Checkpoints
from denserl_cli.core.runs.folder import RunFolder
from denserl_cli.core.stages.run import run_stage
from denserl_cli.terminal.dashboard import make_observer

WEIGHTS = (1_000_000, 40_000_000)
"""Of which the checkpoints are: 12 bytes for each."""


def main() -> None:
    """Print the shares."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help="few steps, to see that it works")
    asked = parser.parse_args()
    quick = ["sandbox.pairs=300", "sandbox.fit_steps=30", "normalizer.pairs=100"]
    settings = quick if asked.quick else ["sandbox.pairs=2000"]
    iterations = 3 if asked.quick else 20
    recipe = load_recipe("sandbox-segment", [*settings, f"ppo.iterations={iterations}"])
    shutil.rmtree(asked.out, ignore_errors=True)
    seconds: dict[str, list[float]] = defaultdict(list)
    observer = make_observer()
    for name in ("advance", "metrics", "sample"):
        setattr(observer, name, clocked(getattr(observer, name), seconds["watch"]))
    RunFolder.log = clocked(RunFolder.log, seconds["log"])  # type: ignore[method-assign]
    lines = ["| | steps | seconds a step | log and progress |", "|---|---|---|---|"]
    for stage in ("train-rm", "fit-function", "train-ppo"):
        for found in seconds.values():
            found.clear()
        run_stage(stage, recipe, asked.out / "run", "fresh", observer)
        steps = [one["seconds"] for one in RunFolder(asked.out / "run", recipe).metrics(stage)
                 if one["step"] and "seconds" in one]  # fmt: skip
        if not steps:
            continue
        # the log tells the observer, so its clock holds the other's
        own = sum(seconds["log"]) + sum(seconds["watch"])
        share = 100 * own / sum(steps)
        mean = statistics.mean(steps)
        lines.append(f"| {stage} | {len(steps)} | {mean:.2f} | at most {share:.2f} % |")
    print("\n".join(lines))
    print("\n| checkpoint, MiB | seconds | of a plain write | ratio |\n|---|---|---|---|")
    for weights in WEIGHTS[:1] if asked.quick else WEIGHTS:
        size, saved, plain = checkpoints(asked.out, weights, rounds=3 if asked.quick else 7)
        print(f"| {size / 2**20:.0f} | {saved:.3f} | {plain:.3f} | {saved / plain:.2f} |")


def checkpoints(out: Path, weights: int, rounds: int) -> tuple[int, float, float]:
    """Bytes of a checkpoint, and the median seconds of saving it and of writing as many."""
    matrices = [torch.nn.Parameter(torch.randn(weights // 8)) for _ in range(8)]
    optimizer = torch.optim.AdamW(matrices)
    for matrix in matrices:
        matrix.grad = torch.randn_like(matrix)
    optimizer.step()
    model = {str(number): matrix.detach() for number, matrix in enumerate(matrices)}
    state = {"model": model, "optimizer": optimizer.state_dict()}
    kept = Checkpoints(out / f"checkpoints-{weights}", {}, keep=1, gigabytes=None)
    took: dict[str, list[float]] = {"saved": [], "plain": []}
    for step in range(rounds + 1):
        took["saved"].append(seconds_of(kept.save, step, state))
        (file,) = kept.folder.rglob("*.pt")
        data = file.read_bytes()
        took["plain"].append(seconds_of(write, out / f"plain-{step % 2}", data))
    saved, plain = (statistics.median(times[1:]) for times in took.values())
    return len(data), saved, plain


def clocked(work: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    """The same, and each call's seconds are noted."""

    def timed(*arguments: Any, **options: Any) -> Any:
        began = time.perf_counter()
        found = work(*arguments, **options)
        seconds.append(time.perf_counter() - began)
        return found

    return timed


def write(file: Path, data: bytes) -> None:
    """Write bytes and have the disk hold them; like the checkpoint's, the one before goes."""
    with file.open("wb") as out:
        out.write(data)
        out.flush()
        os.fsync(out.fileno())
    for other in set(file.parent.glob("plain-*")) - {file}:
        other.unlink()


def seconds_of(work: Callable[..., Any], *arguments: Any) -> float:
    """How long it takes."""
    began = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
