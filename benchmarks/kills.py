"""Kill train-rm and train-ppo with -9 at random moments, resume, compare every byte.

    python benchmarks/kills.py --out runs/kills [--kills 20] [--seed 0] [--jobs 2] [--processes 1]
        [--stages train-rm train-ppo]

Each kill has a run folder and a process of its own. One in three comes at a moment drawn uniformly
from the life of an uninterrupted process, most of which is start-up; one after a random number of
steps; one inside a random checkpoint write. The killed stage is resumed to its end; its weights and
figures must be those of the uninterrupted run. Prints a Markdown table, writes it to OUT/report.md,
and exits with 1 when anything differs.

With several processes a third of the kills hits the launcher, whose processes die with it, and a
third each of the two first processes, after which the launcher ends the job.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from denserl_cli.core.observer import TIMES

STAGES = ("train-rm", "train-ppo")
SETTINGS = (
    *("sandbox.phrases=4", "sandbox.phrase_length=3", "sandbox.response_phrases=4"),
    *("sandbox.pairs=400", "sandbox.hidden_size=32", "sandbox.layers=1", "sandbox.fit_steps=60"),
    *("segmentation.cutoff=1.0", "data.eval_pairs=4", "data.eval_prompts=2"),
    *("reward_model.batch_size=8", "reward_model.micro_batch_size=8", "reward_model.epochs=2"),
    *("reward_model.save_every=4", "normalizer.pairs=40", "ppo.iterations=30", "ppo.epochs=2"),
    *("ppo.rollout.batch_size=8", "ppo.train_batch_size=4", "ppo.micro_batch_size=4"),
    *("ppo.rollout.max_new_tokens=20", "ppo.missing_eos_penalty=null", "ppo.eval_every=10"),
    *("ppo.save_every=2", "ppo.kl_target=0.01"),
)
SEVERAL = (
    *("reward_model.micro_batch_size=2", "reward_model.engine.zero_stage=3"),
    *("sandbox.pairs=200", "reward_model.epochs=1", "reward_model.save_every=1"),
    *("ppo.micro_batch_size=2", "ppo.engine.zero_stage=3", "ppo.epochs=1"),
    *("ppo.iterations=8", "ppo.eval_every=4", "ppo.save_every=1"),
)
"""Shorter runs for several processes, whose start takes longer."""


class Kill(NamedTuple):
    """When to kill: `after` so many seconds, logged steps or checkpoint writes (`unit`)."""

    stage: str
    number: int
    after: float
    unit: str
    processes: int

    @property
    def victim(self) -> int | None:
        """The process that is killed; None: the one that was started, which may be a launcher."""
        return (None, 0, 1)[self.number // 3 % 3] if self.processes > 1 else None


class Row(NamedTuple):
    """What a kill met, and whether the resumed run ended as the uninterrupted one did."""

    stage: str
    number: int
    moment: str
    victim: str
    logged: int
    writing: bool
    resumed: bool
    same: bool


def main() -> None:
    """Run every kill and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=STAGES)
    parser.add_argument("--kills", type=int, default=20, help="for each stage")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--processes", type=int, default=1, help="for each run, under ZeRO 3")
    arguments = parser.parse_args()
    out: Path = arguments.out
    shutil.rmtree(out, ignore_errors=True)
    rows: list[Row] = []
    for stage in STAGES:
        seconds, steps, writes = uninterrupted(stage, out, arguments.processes)
        print(f"{stage}: {seconds:.1f} s uninterrupted, seed {arguments.seed}", flush=True)
        if stage not in arguments.stages:
            continue
        rng = random.Random(f"{arguments.seed} {stage}")
        life = (("seconds", seconds), ("steps", steps), ("writes", writes))
        kills = [
            Kill(stage, number, rng.uniform(0, most), unit, arguments.processes)
            for number in range(arguments.kills)
            for unit, most in [life[number % 3]]
        ]
        with ThreadPoolExecutor(arguments.jobs) as pool:
            rows += pool.map(lambda kill: survive(kill, out), kills)
    report(rows, out / "report.md")
    sys.exit(not all(row.same for row in rows))


def uninterrupted(stage: str, out: Path, processes: int) -> tuple[float, int, int]:
    """Run a stage to its end; returns its seconds, steps and checkpoints."""
    folder = out / stage / "whole"
    if stage == "train-ppo":
        shutil.copytree(out / "train-rm" / "whole", folder)
        if errors := run("fit-function", folder, processes):
            sys.exit(errors)
        shutil.copytree(folder, out / stage / "start")
    else:
        (out / stage / "start").mkdir(parents=True)
    seen: set[str] = set()
    began = time.monotonic()
    with start(stage, folder, processes) as process:
        while process.poll() is None:
            seen |= {path.name for path in folder.glob(f"checkpoints/{stage}/step-*")}
            time.sleep(0.005)
    if process.returncode:
        sys.exit(f"{stage} in {folder} ended with {process.returncode}")
    return time.monotonic() - began, len(figures(stage, folder)), len(seen)


def survive(kill: Kill, out: Path) -> Row:
    """Kill a run, resume it, compare."""
    folder = out / kill.stage / f"kill-{kill.number}"
    shutil.copytree(out / kill.stage / "start", folder)
    with start(kill.stage, folder, kill.processes) as process:
        wait(kill, folder, process.poll)
        victim = strike(process, kill)
        process.communicate()
    moment = f"{kill.after:.1f} {kill.unit}" + (" (done)" if process.returncode == 0 else "")
    logged = len(figures(kill.stage, folder))
    writing = any(folder.glob("**/.*.tmp"))
    errors = run(kill.stage, folder, kill.processes, "--resume")
    whole = outcome(kill.stage, out / kill.stage / "whole")
    same = not errors and outcome(kill.stage, folder) == whole
    print(f"{kill.stage} {kill.number}: {moment}, {victim}", flush=True)
    print(errors or ("same" if same else "DIFFERENT"), flush=True)
    return Row(kill.stage, kill.number, moment, victim, logged, writing, not errors, same)


def strike(process: subprocess.Popen[str], kill: Kill) -> str:
    """Kill what was started, or the process of this number that it has started."""
    import psutil

    number = kill.victim
    if number is not None and process.poll() is None:
        with suppress(psutil.NoSuchProcess):
            started = psutil.Process(process.pid).children()
            working = [child for child in started if "denserl_cli.launch.worker" in child.cmdline()]
            if number < len(working):
                sorted(working, key=lambda child: child.pid)[number].kill()
                return f"process {number}"
    process.kill()
    return "launcher" if kill.processes > 1 else "all"


def wait(kill: Kill, folder: Path, over: Callable[[], int | None]) -> None:
    """Return when the moment has come, or the process is over."""
    began, seen = time.monotonic(), set[Path]()
    while over() is None:
        seen |= set(folder.glob(f"checkpoints/{kill.stage}/.step-*.tmp"))
        now = {
            "seconds": time.monotonic() - began,
            "steps": len(figures(kill.stage, folder)) if kill.unit == "steps" else 0,
            "writes": len(seen),
        }
        if now[kill.unit] > kill.after:
            return
        time.sleep(0.0005)


def start(stage: str, folder: Path, processes: int, *words: str) -> subprocess.Popen[str]:
    """Start a stage as a user would, on one core for each process."""
    more = SEVERAL if processes > 1 else ()
    settings = [word for setting in (*SETTINGS, *more) for word in ("--set", setting)]
    line = [sys.executable, "-m", "denserl_cli.app", stage, "--recipe", "sandbox-segment"]
    return subprocess.Popen(
        [*line, *settings, "--out", str(folder), "--processes", str(processes), *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(stage: str, folder: Path, processes: int, *words: str) -> str:
    """Run a stage to its end; returns what it said where that was none."""
    process = start(stage, folder, processes, *words)
    _, errors = process.communicate()
    if not process.returncode:
        return ""
    return f"{stage} in {folder} ended with {process.returncode}:\n{errors}"


def outcome(stage: str, folder: Path) -> dict[str, object]:
    """Everything that must not depend on how a run got to its end."""
    results = ("reward_model",) if stage == "train-rm" else ("policy", "policy_best")
    files = [folder / result / "model.safetensors" for result in results]
    weights = {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).digest() for f in files}
    return {"figures": figures(stage, folder), **weights}


def figures(stage: str, folder: Path) -> list[dict[str, object]]:
    """The whole lines that a stage has logged, without what the clock says."""
    file = folder / "metrics.jsonl"
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    found = [json.loads(line) for line in lines if line.endswith("}")]
    return [
        {key: value for key, value in line.items() if key not in TIMES}
        for line in found
        if line["stage"] == stage
    ]


def report(rows: list[Row], file: Path) -> None:
    """Write the table and print it."""
    lines = ["| stage | kill | moment | killed | lines logged | writing | resumed | same bytes |"]
    lines.append("|" + "---|" * len(Row._fields))
    for row in rows:
        cells = ("yes" if c is True else "no" if c is False else str(c) for c in row)
        lines.append("| " + " | ".join(cells) + " |")
    for stage in dict.fromkeys(row.stage for row in rows):
        mine = [row for row in rows if row.stage == stage]
        counts = [sum(row.resumed for row in mine), sum(row.same for row in mine), len(mine)]
        lines.append("\n{}: {} resumed and {} the same bytes, of {}".format(stage, *counts))
    text = "\n".join(lines) + "\n"
    file.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
