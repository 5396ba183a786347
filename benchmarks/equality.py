"""Train the sandbox through every engine and number of processes; the numbers must be the same.

    python benchmarks/equality.py --out runs/equality [--only NAME ...]

train-rm, fit-function and train-ppo run once in one process with plain torch, then under DeepSpeed
with every ZeRO stage, in one process and in two, from the same files and the same global batches.
Compared are all figures of all steps, the sampled responses, and the final weights, in shares of
their peak learning rate. Prints a Markdown table, writes it to OUT/report.md, and exits with 1 when
anything differs by more than the tolerances.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from denserl_cli.core.observer import TIMES

TOLERANCE = 1e-5
"""Of a figure, relative to its size or to 1, whichever is larger."""
WEIGHTS = 0.05
"""Of a weight, in peak learning rates: Adam turns a rounding of the gradient into a part of one."""
STAGES = ("train-rm", "fit-function", "train-ppo")
EVALUATIONS: dict[str, dict[str, object]] = {
    "evaluate-rm": {"name": "pairs"},
    "evaluate-policy": {"samples": 2},
}
LEARNING_RATES = {"train-rm": 2e-3, "train-ppo": 5e-4}
RESULTS = {"train-rm": "reward_model", "train-ppo": "policy"}
SETTINGS = (
    *("sandbox=null", "segmentation.cutoff=1.0", "data.eval_pairs=5", "data.eval_prompts=3"),
    *("reward_model.batch_size=8", "reward_model.micro_batch_size=2", "reward_model.epochs=2"),
    *("reward_model.eval_every=4", "reward_model.save_every=100"),
    *("normalizer.pairs=21", "normalizer.batch_size=4"),
    *("ppo.iterations=3", "ppo.rollout.batch_size=8", "ppo.rollout.samples_per_prompt=1"),
    *("ppo.rollout.micro_batch_size=3", "ppo.train_batch_size=8", "ppo.micro_batch_size=2"),
    *("ppo.rollout.max_new_tokens=24", "ppo.missing_eos_penalty=null", "ppo.eval_samples=1"),
    *("ppo.eval_every=2", "ppo.save_every=100", "ppo.epochs=2", "run.log_samples=8"),
)
"""A tiny run in which nothing divides: micro batches, processes, evaluations."""
SMALL = "{zero_optimization: {stage3_param_persistence_threshold: 0}}"
"""Shards the smallest weights as well, which ZeRO 3 would otherwise keep whole."""


class Case(NamedTuple):
    """A way to train: DeepSpeed's ZeRO stage or plain torch (0), and in how many processes."""

    name: str
    stage: int
    processes: int
    settings: tuple[str, ...] = ()

    def overrides(self) -> list[str]:
        """The recipe overrides of this case."""
        kind = "deepspeed" if self.stage else "torch"
        made = [f"{block}.engine.kind={kind}" for block in ("reward_model", "ppo")]
        if self.stage:
            for block in ("reward_model", "ppo"):
                made.append(f"{block}.engine.zero_stage={self.stage}")
                made.append(f"{block}.engine.deepspeed={SMALL}")
        return [*made, *self.settings]


class Group(NamedTuple):
    """Cases that must be equal to the first one."""

    settings: tuple[str, ...]
    cases: tuple[Case, ...]


def _uncut(granularity: str) -> tuple[str, ...]:
    return (f"segmentation.granularity={granularity}", "segmentation.cutoff=null")


_ONE_BY_ONE = ("reward_model.micro_batch_size=1", "ppo.micro_batch_size=1")
_WHOLE = ("reward_model.micro_batch_size=8", "ppo.micro_batch_size=8")
PLAIN = Case("torch", 0, 1)
TWO = tuple(Case(f"ZeRO-{stage} x 2", stage, 2) for stage in (1, 2, 3))
ONE = tuple(Case(f"ZeRO-{stage} x 1", stage, 1) for stage in (1, 2, 3))
GROUPS = {
    "segment": Group((), (PLAIN, *ONE, *TWO)),
    "token": Group(_uncut("token"), (PLAIN, *TWO[1:])),
    "bandit": Group(_uncut("bandit"), (PLAIN, *TWO[1:])),
    "critic from the reward model": Group(("ppo.critic_init=reward_model",), (PLAIN, *TWO[1:])),
    "loss over tokens": Group(("ppo.loss_reduce=token",), (PLAIN, *TWO[1:])),
    "critic warm-up": Group(("ppo.critic_warmup=1",), (PLAIN, *TWO[1:])),
    "gradient checkpointing": Group(("model.gradient_checkpointing=true",), (PLAIN, *TWO[1:])),
    "LoRA": Group(("lora={rank: 4}",), (PLAIN, *TWO[:2])),
    "accumulation": Group(
        (),
        (
            Case("torch, 8", 0, 1, _WHOLE),
            Case("torch, 8 x 1", 0, 1, _ONE_BY_ONE),
            Case("ZeRO-2 x 1, 8", 2, 1, _WHOLE),
            Case("ZeRO-2 x 1, 8 x 1", 2, 1, _ONE_BY_ONE),
            Case("ZeRO-2 x 2, 4 x 1", 2, 2, _ONE_BY_ONE),
            Case("ZeRO-3 x 2, 4 x 1", 3, 2, _ONE_BY_ONE),
        ),
    ),
    "three processes": Group((), (PLAIN, Case("ZeRO-2 x 3", 2, 3), Case("ZeRO-3 x 3", 3, 3))),
}


class Difference(NamedTuple):
    """How far two runs are apart: figures, weights in learning rates, and whether texts are."""

    figure: float
    figure_name: str
    reward_model: float
    policy: float
    same_samples: bool

    @property
    def small(self) -> bool:
        """Whether it is within the tolerances."""
        weights = max(self.reward_model, self.policy)
        return self.figure <= TOLERANCE and weights <= WEIGHTS and self.same_samples


def main() -> None:
    """Run every group and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="*", choices=list(GROUPS), default=list(GROUPS))
    arguments = parser.parse_args()
    out: Path = arguments.out.absolute()
    shutil.rmtree(out, ignore_errors=True)
    base = make_task(out / "task")
    rows = [
        "| what | trained by | figures apart | the farthest | reward model, in learning rates | "
        "policy, in learning rates | same responses | within |",
        "|" + "---|" * 8,
    ]
    good = True
    for name in arguments.only:
        group = GROUPS[name]
        folders = run_cases(group.cases, out / name.replace(" ", "-"), [*base, *group.settings])
        for case in group.cases[1:]:
            found = compare(folders[group.cases[0]], folders[case])
            good &= found.small
            cells = [name, case.name, f"{found.figure:.1e}", found.figure_name]
            cells += [f"{found.reward_model:.1e}", f"{found.policy:.1e}"]
            cells += ["yes" if yes else "NO" for yes in (found.same_samples, found.small)]
            rows.append("| " + " | ".join(cells) + " |")
            print(rows[-1], flush=True)
    text = "\n".join(rows) + "\n"
    (out / "report.md").write_text(text, encoding="utf-8")
    print(f"\n{text}")
    sys.exit(not good)


def make_task(folder: Path) -> list[str]:
    """Make model, tokenizer and data once; returns the settings of every run on them."""
    from denserl_cli.core.observer import Observer
    from denserl_cli.core.recipe.schema import SandboxConfig
    from denserl_cli.core.sandbox.files import make

    task = SandboxConfig(
        phrases=4,
        phrase_length=3,
        response_phrases=4,
        pairs=58,
        hidden_size=32,
        layers=1,
        fit_steps=150,
    )
    slots = make(task, folder, seed=1, observer=Observer())
    places = [f"model.path={slots.model}", f"data.preferences=[{slots.preferences}]"]
    return [*SETTINGS, *places, f"data.prompts=[{slots.prompts}]"]


def run_cases(cases: Sequence[Case], out: Path, settings: Sequence[str]) -> dict[Case, Path]:
    """Run all stages of each case; those of as many processes share one launch."""
    folders = {case: out / case.name.replace(" ", "-").replace(",", "") for case in cases}
    for processes in sorted({case.processes for case in cases}):
        jobs = [
            (stage, str(folders[case]), [*settings, *case.overrides()])
            for case in cases
            if case.processes == processes
            for stage in STAGES
        ]
        run_jobs(jobs, processes)
    return folders


def run_jobs(jobs: Sequence[tuple[str, str, list[str]]], processes: int) -> None:
    """Run stages one after the other in one group of processes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    words = [f"--nproc-per-node={processes}", str(Path(__file__)), "--jobs", json.dumps(jobs)]
    done = subprocess.run(
        [*launcher, *words],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{processes} processes failed:\n{done.stdout}{done.stderr}")


def work(jobs: Sequence[tuple[str, str, list[str]]]) -> None:
    """Be one of the processes."""
    from denserl_cli.core.observer import Observer
    from denserl_cli.core.recipe import load_recipe
    from denserl_cli.core.stages.run import evaluate, run_stage
    from denserl_cli.core.system import distributed

    distributed.join()
    for stage, folder, settings in jobs:
        recipe = load_recipe("sandbox-segment", settings)
        if stage in EVALUATIONS:
            evaluate(stage, recipe, Path(folder), Observer(), EVALUATIONS[stage])
        else:
            run_stage(stage, recipe, Path(folder), "start", Observer())
    distributed.leave()


def compare(plain: Path, other: Path) -> Difference:
    """How far two finished runs are apart."""
    figure, name = max(_apart(plain, other))
    weights = {
        stage: weights_apart(plain / folder, other / folder) / LEARNING_RATES[stage]
        for stage, folder in RESULTS.items()
    }
    responses = [
        [[part["text"] for part in line["segments"]] for line in read_lines(f / "samples.jsonl")]
        for f in (plain, other)
    ]
    return Difference(
        figure, name, weights["train-rm"], weights["train-ppo"], responses[0] == responses[1]
    )


def _apart(plain: Path, other: Path) -> Iterator[tuple[float, str]]:
    """The difference of each figure, and its name."""
    first, second = (
        [*read_lines(f / "metrics.jsonl"), *read_lines(f / "samples.jsonl"), _normalizer(f)]
        for f in (plain, other)
    )
    if len(first) != len(second):
        yield math.inf, f"{len(second)} lines instead of {len(first)}"
        return
    for expected, found in zip(first, second, strict=True):
        if expected.keys() != found.keys():
            yield math.inf, f"other figures: {sorted(expected.keys() ^ found.keys())}"
        for name in (expected.keys() & found.keys()) - {*TIMES}:
            yield distance(expected[name], found[name]), name


def distance(expected: object, found: object) -> float:
    """The largest difference in two values, relative to its size or to 1."""
    if isinstance(expected, dict) and isinstance(found, dict):
        expected, found = (list(each.items()) for each in (expected, found))
    if isinstance(expected, tuple) and isinstance(found, tuple):
        expected, found = list(expected), list(found)
    if isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        return max((distance(a, b) for a, b in zip(expected, found, strict=True)), default=0.0)
    if isinstance(expected, int | float) and isinstance(found, int | float):
        return abs(expected - found) / max(1.0, abs(expected))
    return 0.0 if expected == found else math.inf


def _normalizer(folder: Path) -> dict[str, object]:
    values = json.loads((folder / "reward_model" / "normalizer.json").read_text())
    return {name: value for name, value in values.items() if isinstance(value, float)}


def weights_apart(plain: Path, other: Path) -> float:
    """The largest difference of a weight in two folders."""
    from safetensors.torch import load_file

    first, second = (
        {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}
        for folder in (plain, other)
    )
    if not first or first.keys() != second.keys():
        return math.inf
    return max((first[k].float() - second[k].float()).abs().max().item() for k in first)


def read_lines(file: Path) -> list[dict[str, object]]:
    """The objects of a JSON lines file."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]


if __name__ == "__main__":
    if sys.argv[1:2] == ["--jobs"]:
        work(json.loads(sys.argv[2]))
    else:
        main()
