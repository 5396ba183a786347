"""What is not training: the share of logging, progress and samples in a step, and of checkpoints.

    python benchmarks/overhead.py --out runs/overhead [--quick]

train-rm and train-ppo run on the embedded task, in this process, with the progress of a log file.
Clocks around `RunFolder.log` and the observer say how much of all steps they take; each checkpoint
is compared with a plain write of as many bytes to the same disk, flushed to it (`fsync`).
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

from denserl_cli.core.recipe import load_recipe
from denserl_cli.core.run import RunFolder
from denserl_cli.dashboard import make_observer
from denserl_cli.worker import run_stage


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
    sizes: list[int] = []
    observer = make_observer()
    for name in ("advance", "figures", "sample"):
        setattr(observer, name, clocked(getattr(observer, name), seconds["watch"]))
    RunFolder.log = clocked(RunFolder.log, seconds["log"])  # type: ignore[method-assign]
    RunFolder.save_checkpoint = measured(RunFolder.save_checkpoint, seconds["save"], sizes)  # type: ignore[method-assign]
    lines = ["| | steps | seconds a step | log and progress | checkpoints / plain writes |"]
    lines.append("|---|---|---|---|---|")
    for stage in ("train-rm", "fit-function", "train-ppo"):
        for found in (*seconds.values(), sizes):
            found.clear()
        run_stage(stage, recipe, asked.out / "run", "fresh", observer)
        steps = [one["seconds"] for one in RunFolder(asked.out / "run", recipe).metrics(stage)
                 if one["step"] and "seconds" in one]  # fmt: skip
        if not steps:
            continue
        # the log tells the observer, so its clock holds the other's
        own = sum(seconds["log"]) + sum(seconds["watch"])
        plain = [written(asked.out / "plain", size) for size in sizes]
        ratio = statistics.median(seconds["save"]) / statistics.median(plain)
        lines.append(
            f"| {stage} | {len(steps)} | {statistics.mean(steps):.2f} | "
            f"at most {100 * own / sum(steps):.2f} % | {ratio:.2f} |"
        )
    print("\n".join(lines))


def clocked(work: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    """The same, and each call's seconds are noted."""

    def timed(*arguments: Any, **options: Any) -> Any:
        began = time.perf_counter()
        found = work(*arguments, **options)
        seconds.append(time.perf_counter() - began)
        return found

    return timed


def measured(
    save: Callable[..., None], seconds: list[float], sizes: list[int]
) -> Callable[..., None]:
    """The same, and each checkpoint's seconds and bytes are noted."""
    timed = clocked(save, seconds)

    def saved(run: RunFolder, stage: str, step: int, *rest: Any) -> None:
        timed(run, stage, step, *rest)
        newest = max((run.path / "checkpoints" / stage).glob("step-*"))
        sizes.append(sum(file.stat().st_size for file in newest.rglob("*") if file.is_file()))

    return saved


def written(file: Path, size: int) -> float:
    """Seconds to write so many bytes and flush them."""
    data = os.urandom(size)
    began = time.perf_counter()
    with file.open("wb") as out:
        out.write(data)
        out.flush()
        os.fsync(out.fileno())
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
