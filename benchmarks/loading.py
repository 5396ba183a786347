"""Host memory while train-ppo loads its four models, in 1, 2, 4 processes, beside another tree.

    python benchmarks/loading.py --model FOLDER --out runs/loading [--beside TREE] \
        [--processes 1 2 4] [--zero-stage 3] [--dtype bfloat16] [--saved bfloat16]

Policy, critic, reference and reward model of train-ppo are loaded on the CPU as the stage does it.
Measured is the private memory of all processes together (Private_Clean + Private_Dirty of
/proc/PID/smaps_rollup), above what it was just before, when all libraries were in use already: when
recipe and tokenizers are read, at its highest while one of the models is being loaded, at its
highest until both engines with their optimizers stand, and at the end. A page of the model's file
counts while one process alone has it. The trees take turns. Prints a Markdown table in MiB.
"""

from __future__ import annotations

import argparse
import copy
import gc
import inspect
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
MIB = 2**20


class Peaks(NamedTuple):
    """Bytes of private memory of all processes above the start."""

    prepared: int
    loading: int
    highest: int
    end: int


def main() -> None:
    """Measure every case and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--beside", type=Path, help="another tree of this repository")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--zero-stage", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--saved", default="float32", help="type of the weights in the files")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.work:
        work(asked)
        return
    asked.out.mkdir(parents=True, exist_ok=True)
    prepare(asked)
    trees = {"this tree": ROOT, **({"beside": asked.beside} if asked.beside else {})}
    print("| processes | tree | before | while loading | until engines stand | at the end |")
    print("|---|---|---|---|---|---|")
    for count in asked.processes:
        for name, tree in trees.items():
            found = [f"{value / MIB:.0f}" for value in measure(asked, tree.resolve(), count)]
            print(f"| {count} | {name} | {' | '.join(found)} |", flush=True)


def prepare(asked: argparse.Namespace) -> None:
    """Policy and reward model made of the model, and tiny ones that warm the libraries up."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
    from transformers import AutoTokenizer as Tokenizer

    torch.manual_seed(0)
    tokenizer = Tokenizer.from_pretrained(asked.model)
    tiny = AutoConfig.from_pretrained(asked.model)
    tiny.update({"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1})
    tiny.update({"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32})
    saved = getattr(torch, asked.saved)
    one_label = copy.deepcopy(tiny)
    one_label.num_labels = 1
    models: dict[str, Any] = {
        "tiny": AutoModelForCausalLM.from_config(tiny),
        "tiny-reward": AutoModelForSequenceClassification.from_config(one_label),
        "reward": AutoModelForSequenceClassification.from_pretrained(
            asked.model, num_labels=1, dtype=saved
        ),
        "policy": AutoModelForCausalLM.from_pretrained(asked.model, dtype=saved),
    }
    for name, model in models.items():
        model.save_pretrained(asked.out / name)
        tokenizer.save_pretrained(asked.out / name)


def measure(asked: argparse.Namespace, tree: Path, count: int) -> Peaks:
    """Load in so many processes of a tree; what they held while they did."""
    marks = asked.out / "marks"
    marks.unlink(missing_ok=True)
    shutil.rmtree(asked.out / "runs", ignore_errors=True)
    words = [str(Path(__file__).resolve()), *sys.argv[1:], "--work"]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    environment = {
        **os.environ,
        "PYTHONPATH": str(tree),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "MALLOC_MMAP_THRESHOLD_": "65536",  # what is freed goes back at once
        "MALLOC_TRIM_THRESHOLD_": "65536",
        "MALLOC_ARENA_MAX": "1",
    }
    log = asked.out / "log"
    with log.open("w") as output:
        job = subprocess.Popen(
            [sys.executable, *launcher, *words], stdout=output, stderr=output, env=environment
        )
        samples: list[tuple[float, int]] = []
        while job.poll() is None:
            pids = [line[1] for line in read(marks) if line[0] == "process"]
            if len(pids) == count:
                samples.append((time.time(), sum(map(private, pids))))
            time.sleep(0.02)
    if job.returncode:
        raise SystemExit(f"{tree} failed:\n{log.read_text()[-3000:]}")
    return peaks([(line[0], float(line[1])) for line in read(marks)], samples)


def peaks(marks: list[tuple[str, float]], samples: list[tuple[float, int]]) -> Peaks:
    """What the samples say of the spans between the marks of the first process."""
    words = ("before", "between", "load", "engine", "after", "end")
    spans: dict[str, list[int]] = {word: [] for word in words}
    times = [mark for mark in marks if mark[0] in spans]
    for moment, value in samples:
        name = next((name for name, since in reversed(times) if since <= moment), None)
        if name is not None:
            spans[name].append(value)
    first = next(since for name, since in times if name == "load")
    prepared = [value for moment, value in samples if moment <= first][-1]
    highest = max(spans["load"] + spans["engine"])
    found = Peaks(prepared, max(spans["load"]), highest, min(spans["after"]))
    return Peaks(*(value - min(spans["before"]) for value in found))


def read(marks: Path) -> list[list[str]]:
    """The lines that the processes have written so far, in words."""
    return [line.split() for line in marks.read_text().splitlines()] if marks.exists() else []


def private(pid: str) -> int:
    """Bytes that a process alone holds; 0 when it has gone."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    held = dict(line.split()[:2] for line in lines[1:])
    return (int(held["Private_Clean:"]) + int(held["Private_Dirty:"])) * 1024


def work(asked: argparse.Namespace) -> None:
    """Load the models in this process, first tiny ones; the first process marks what it does."""
    from denserl_cli.core.stages import train_ppo
    from denserl_cli.core.system import distributed

    def mark(word: str) -> None:
        distributed.barrier()
        if distributed.is_main_process():
            with (asked.out / "marks").open("a") as file:
                file.write(f"{word} {time.time()}\n")
        distributed.barrier()

    def marked(word: str, function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            mark(word)
            result = function(*arguments, **options)
            mark("between")
            return result

        return call

    distributed.join()
    load(asked, asked.out / "tiny", asked.out / "tiny-reward")
    gc.collect()
    with (asked.out / "marks").open("a") as file:
        file.write(f"process {os.getpid()}\n")
    mark("before")
    time.sleep(1)
    loads = ("load_reference", "load_scorer", "load_reward_model", "new_policy", "new_scalar_model")
    for name in loads:
        setattr(train_ppo, name, marked("load", getattr(train_ppo, name)))
    train_ppo.make_engine = marked("engine", train_ppo.make_engine)  # type: ignore[attr-defined]
    mark("between")
    held = load(asked, asked.out / "policy", asked.out / "reward")
    gc.collect()
    mark("after")
    time.sleep(1)
    mark("end")
    del held
    distributed.leave()


def load(asked: argparse.Namespace, model: Path, reward: Path) -> Any:
    """The models of train-ppo, as the stage loads them."""
    from denserl_cli.core.observer import Observer
    from denserl_cli.core.recipe import load_recipe
    from denserl_cli.core.runs.folder import RunFolder
    from denserl_cli.core.scoring.resolve import prepare as prepare_run
    from denserl_cli.core.stages import train_ppo
    from denserl_cli.core.stages.run import quiet_libraries

    quiet_libraries()
    recipe = load_recipe(
        "sandbox-segment",
        [
            f"model.path={model}",
            f"model.dtype={asked.dtype}",
            "sandbox=null",
            f"published={{reward_model: {reward}, granularity: segment, cutoff: 1.0}}",
            "segmentation.cutoff=1.0",
            f"ppo.engine.zero_stage={asked.zero_stage}",
            "ppo.engine.kind=deepspeed",
        ],
    )
    run = RunFolder(asked.out / "runs" / model.name, recipe)
    setup = prepare_run(recipe, run, Observer(), reward_model=True)
    plan: Any = SimpleNamespace(prompts=range(64))
    further = len(inspect.signature(train_ppo._models).parameters) - 4  # of this or another tree
    return train_ppo._models(setup, run, Observer(), plan, *[()] * further)


if __name__ == "__main__":
    main()
