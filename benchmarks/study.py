"""The study: what granularity, normaliser, interpolation and the rest do, on tasks of known reward.

    python benchmarks/study.py run --out runs/study [--quick] [--preferences pairs.jsonl]
    python benchmarks/study.py report --results benchmarks/results/study --to docs/study

`run` trains every arm of the grid for every seed, one process an arm, and leaves a small JSON file
of each in the results folder; killed and started again, it goes on where it was. Starting models
are shared by arms of the same task and seed, reward models by those that also train it alike.
`report` makes tables and plots from these files alone.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import study_english
from benchmarks.study_report import report

SEEDS = (0, 1, 2, 3, 4)
MORE_SEEDS = (5, 6, 7)
"""Of the main comparison alone."""
BASE = ("sandbox.pairs=3000", "data.eval_prompts=16", "ppo.eval_samples=8", "ppo.iterations=15",
        "ppo.eval_every=15", "ppo.save_every=15", "run.log_samples=2")  # fmt: skip
"""What all arms share, over the recipe `sandbox-segment`."""
READ_BY_REWARD_MODEL = ("seed", "sandbox", "segmentation", "reward_model", "data", "model")
COLUMNS = ("step", "true_reward", "kl", "response_length", "segments_per_response", "terminated")


class Task(NamedTuple):
    """A controlled task: settings that make it, and the factors that are varied on it.

    true: the figure of its true reward. MADE in a setting stands for the folder of its files.
    """

    settings: tuple[str, ...]
    factors: tuple[str, ...]
    true: str = "true_reward"


MADE = "{made}"
PLAIN = "python:benchmarks.study_rewards.plain"
TASKS = {
    "long": Task(
        ("sandbox.response_phrases=48", "ppo.rollout.max_new_tokens=256", "data.max_length=384"),
        ("granularity", "KL coefficient", "lambda"),
    ),
    "medium": Task(
        (),
        (
            *("granularity", "normaliser", "interpolation", "segment total"),
            *("cutoff", "cut", "aggregation", "pairs", "samples"),
        ),
    ),
    "short": Task(
        ("sandbox.response_phrases=6", "ppo.rollout.max_new_tokens=48"), ("granularity",)
    ),
    "endings": Task(
        ("sandbox.phrases=8", "sandbox.endings=2", "segmentation.cutoff=0.9"), ("granularity",)
    ),
    "english": Task(
        (
            *("sandbox=null", f"model.path={MADE}/model", f"data.preferences={MADE}/pairs.jsonl"),
            *(f"data.prompts={MADE}/prompts.jsonl", "segmentation.cutoff=auto"),
            *(
                "ppo.rollout.max_new_tokens=96",
                "ppo.reward_model_weight=1.0",
                "data.eval_prompts=32",
            ),
            *(
                "reward_model.epochs=1.0",
                "ppo.eval_samples=4",
                f"ppo.reward=[{{function: {PLAIN}, weight: 0}}]",
            ),
        ),
        ("granularity in English", "cut in English"),
        "reward_plain",
    ),
}
"""long, medium, short: 48, 24 and 6 phrases a response. endings: 24 phrases, each of 8 beginnings
and 2 endings that are worth something together alone, so that single words mislead. english:
beginnings of real answers, with a reward for each sentence (`study_english.py`)."""


def _cut(text: str) -> tuple[str, ...]:
    return (f"segmentation={{{text}}}", "segmentation.cutoff=null")


MAIN = ("long", "granularity")
GRANULARITIES: dict[str, tuple[str, ...]] = {
    "segment": (),
    "token": _cut("granularity: token"),
    "bandit": _cut("granularity: bandit"),
}
TRUE = "ppo.reward=true_reward"
PHRASES = "ppo.reward=python:benchmarks.study_rewards.phrase_worth"
FACTORS: dict[str, dict[str, tuple[str, ...]]] = {
    "granularity": {
        **GRANULARITIES,
        "true reward, response": (TRUE,),
        "true reward, segments": (PHRASES,),
    },
    "granularity in English": {
        **GRANULARITIES,
        "true reward, response": (f"ppo.reward={PLAIN}", "ppo.reward_model_weight=0"),
    },
    "cut in English": {"sentences": _cut("cut: sentence")},
    "KL coefficient": {
        f"{name}, KL {kl}": (*settings, f"ppo.kl_coef={kl}")
        for kl in (0.005, 0.08)
        for name, settings in GRANULARITIES.items()
    },
    "samples": {
        f"{name}, 30 iterations": (*settings, "ppo.iterations=30")
        for name, settings in GRANULARITIES.items()
    },
    "lambda": {
        f"{name}, lambda 1": (*GRANULARITIES[name], "ppo.lam=1.0") for name in ("segment", "bandit")
    },
    "normaliser": {
        f"normaliser {k}": (f"normalizer.kind={k}",) for k in ("global", "last", "none")
    },
    "interpolation": {f"interpolation {k}": (f"ppo.interpolation={k}",) for k in ("repeat", "end")},
    "segment total": {
        "total sum": ("ppo.segment_total=sum",),
        "total sum, KL 0.1": ("ppo.segment_total=sum", "ppo.kl_coef=0.1"),
    },
    "cutoff": {f"cutoff {c}": (f"segmentation.cutoff={c}",) for c in (0.1, 1.0, 2.0)},
    "cut": {
        "quantile 0.75": _cut("cut: quantile, quantile: 0.75"),
        "fixed 4": _cut("cut: fixed, segment_length: 4"),
        "random 4": _cut("cut: random, segment_length: 4"),
    },
    "aggregation": {f"aggregate {k}": (f"reward_model.aggregate={k}",) for k in ("sum", "last")},
    "pairs": {f"{n} pairs": (f"sandbox.pairs={n}",) for n in (500, 1500)},
}
"""One factor at a time around the base arm, `segment`."""


class Arm(NamedTuple):
    """One training of a policy: its task, its name, its settings and its seed."""

    task: str
    factor: str
    name: str
    seed: int
    settings: tuple[str, ...]

    @property
    def slug(self) -> str:
        """A file name."""
        words = "".join(c if c.isalnum() or c == "." else "-" for c in self.name)
        return f"{words.replace('--', '-')}-{self.seed}"

    def shared(self, blocks: Iterable[str]) -> tuple[str, ...]:
        """The settings of certain blocks, which name what may be shared."""
        chosen = tuple(blocks)
        return tuple(s for s in self.settings if s.partition("=")[0].partition(".")[0] in chosen)


def main() -> None:
    """Run the grid, or report on what has been run."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run")
    running.add_argument("--out", type=Path, required=True, help="where the runs go")
    running.add_argument("--results", type=Path, help="where results go; OUT/results without it")
    running.add_argument("--seeds", type=int, nargs="+")
    running.add_argument("--tasks", nargs="+", choices=list(TASKS))
    running.add_argument("--arms", nargs="+", help="names of the arms; all without it")
    running.add_argument(
        "--preferences", type=Path, help="real preference pairs for the task `english`"
    )
    running.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    running.add_argument("--quick", action="store_true", help="the main comparison alone")
    reporting = commands.add_parser("report")
    reporting.add_argument("--results", type=Path, required=True)
    reporting.add_argument("--to", type=Path, required=True, help="where tables and plots go")
    asked = parser.parse_args()
    if asked.command == "run":
        asked.results = asked.results or asked.out / "results"
        run(asked)
        asked.to = asked.out / "report"
    report(asked.results, asked.to)


def run(asked: argparse.Namespace) -> None:
    """Train every arm that has no result yet."""
    tasks = asked.tasks or list(TASKS)
    if (
        "english" in tasks
        and not asked.quick
        and not (asked.preferences and asked.preferences.is_file())
    ):
        print("without the task english: --preferences names no file of preference pairs")
        tasks = [name for name in tasks if name != "english"]
    arms = [
        arm
        for arm in grid(asked.quick, asked.seeds)
        if arm.task in tasks and arm.name in (asked.arms or [arm.name])
        if not finished(asked.results, arm)
    ]
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(asked.jobs, mp_context=context, initializer=_end_with_us) as pool:
        # what others share comes first, and once: sandboxes, then reward models, then policies
        for what in (sandbox_of, reward_model_of):
            once = {what(asked.out, arm): arm for arm in arms}
            _all(
                pool.submit(_prepare, what.__name__, asked.out, arm, asked.preferences)
                for arm in once.values()
            )
        _all(pool.submit(train, asked.out, asked.results, arm) for arm in arms)


def _end_with_us() -> None:
    """Let a worker process end when the one that started it has, however that was."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _all(jobs: Iterable[Future[str]]) -> None:
    """Wait for jobs, and say how far they are; the first error ends the others."""
    left = set(jobs)
    while left:
        done, left = wait(left, return_when="FIRST_COMPLETED")
        try:
            for job in done:
                print(f"{time.strftime('%H:%M:%S')}  {job.result()}; {len(left)} left", flush=True)
        except BaseException:
            for job in left:
                job.cancel()
            raise


def grid(quick: bool, seeds: Sequence[int] | None = None) -> list[Arm]:
    """Every arm, one factor at a time, for its seeds or for those that are asked for."""
    task, factor = MAIN
    tasks = {task: TASKS[task]._replace(factors=(factor,))} if quick else TASKS
    return [
        Arm(name, factor, arm, seed, (f"seed={seed}", *BASE, *made.settings, *settings))
        for name, made in tasks.items()
        for factor in made.factors
        for seed in seeds or (SEEDS[:3] if quick else _seeds(name, factor))
        for arm, settings in FACTORS[factor].items()
        if not quick or arm in GRANULARITIES
    ]


def _seeds(task: str, factor: str) -> tuple[int, ...]:
    return (*SEEDS, *MORE_SEEDS) if (task, factor) == MAIN else SEEDS


def sandbox_of(out: Path, arm: Arm) -> Path:
    """The folder that holds the arm's starting model and data; the sandbox's is a run folder."""
    name = _named((arm.task if arm.task == "english" else "", *arm.shared(("seed", "sandbox"))))
    return out.absolute() / "starts" / name


def reward_model_of(out: Path, arm: Arm) -> Path:
    """The run folder that holds the arm's reward model."""
    return out / "reward-models" / _named(arm.shared(READ_BY_REWARD_MODEL))


def result_file(results: Path, arm: Arm) -> Path:
    """The file of an arm's result."""
    return results / arm.task / f"{arm.slug}.json"


def finished(results: Path, arm: Arm) -> bool:
    """Whether an arm has a result, with the settings that it has now."""
    file = result_file(results, arm)
    if not file.exists():
        return False
    return bool(json.loads(file.read_text(encoding="utf-8"))["settings"] == list(arm.settings))


def _named(settings: Sequence[str]) -> str:
    import hashlib

    return hashlib.blake2b("\n".join(settings).encode(), digest_size=6).hexdigest()


def _prepare(what: str, out: Path, arm: Arm, preferences: Path | None) -> str:
    """Make what several arms share, unless it is there."""
    from denserl_cli.core.observer import Observer
    from denserl_cli.core.runs.folder import RunFolder
    from denserl_cli.core.sandbox.files import with_sandbox_files

    start, folder = sandbox_of(out, arm), reward_model_of(out, arm)
    if what == "sandbox_of":
        if arm.task == "english":
            assert preferences is not None
            study_english.make(preferences, start, arm.seed)
        else:
            recipe = recipe_of(out, arm, READ_BY_REWARD_MODEL)
            with_sandbox_files(recipe, RunFolder(start, recipe), Observer())
        return f"starting model for {arm.task}, seed {arm.seed}"
    recipe = recipe_of(out, arm, READ_BY_REWARD_MODEL)
    _stage("train-rm", recipe, folder if arm.task == "english" else _copied(start, folder))
    return f"reward model of {arm.task}, {arm.name}, seed {arm.seed}"


def train(out: Path, results: Path, arm: Arm) -> str:
    """Fit the normaliser, train the policy, and leave the arm's result."""
    recipe, began = recipe_of(out, arm), time.process_time()
    folder = _copied(reward_model_of(out, arm), out / arm.task / arm.slug)
    if recipe.ppo.learned_weight:
        _stage("fit-function", recipe, folder)
    _stage("train-ppo", recipe, folder)
    file = result_file(results, arm)
    file.parent.mkdir(parents=True, exist_ok=True)
    found = result_of(recipe, arm, folder, time.process_time() - began)
    aside = file.with_suffix(".tmp")
    aside.write_text(json.dumps(found) + "\n", encoding="utf-8")
    aside.replace(file)
    shutil.rmtree(folder)
    return f"{arm.task}: {arm.name}, seed {arm.seed}"


def recipe_of(out: Path, arm: Arm, blocks: Iterable[str] | None = None) -> Any:
    """The arm's recipe; with blocks, as far as what is shared depends on it."""
    from denserl_cli.core.recipe import load_recipe

    settings = arm.settings if blocks is None else arm.shared(blocks)
    made = str(sandbox_of(out, arm))
    settings = tuple(setting.replace(MADE, made) for setting in settings)
    return load_recipe("sandbox-segment", [*settings, "name=study"])


def _stage(stage: str, recipe: Any, folder: Path) -> None:
    import torch

    from denserl_cli.core.observer import Observer
    from denserl_cli.core.stages.run import run_stage

    torch.set_num_threads(1)
    run_stage(stage, recipe, folder, "resume", Observer())


def _copied(source: Path, target: Path) -> Path:
    """A run folder to go on from; one that is there already is gone on with."""
    if not target.exists():
        aside = target.with_name(f".{target.name}.tmp")
        shutil.rmtree(aside, ignore_errors=True)
        shutil.copytree(source, aside, ignore=shutil.ignore_patterns("lock"))
        aside.rename(target)
    return target


def result_of(recipe: Any, arm: Arm, folder: Path, seconds: float) -> dict[str, Any]:
    """What is kept of an arm: its settings, its learning curve, its evaluations."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    ppo = [line for line in lines if line["stage"] == "train-ppo"]
    rm = [line for line in lines if line["stage"] == "train-rm"]
    names = [TASKS[arm.task].true if name == "true_reward" else name for name in COLUMNS]
    evaluated = [line for line in ppo if f"eval_{names[1]}" in line]
    return {
        "task": arm.task,
        "factor": arm.factor,
        "arm": arm.name,
        "seed": arm.seed,
        "settings": list(arm.settings),
        "best_possible": _rounded(best_possible(recipe)),
        "rm_accuracy": _rounded(rm[-1]["eval_accuracy"]),
        "cpu_seconds": round(seconds),
        "columns": list(COLUMNS),
        "training": [[_rounded(line[name]) for name in names] for line in ppo[1:]],
        "held_out": [
            [line["step"], *(_rounded(line[f"eval_{name}"]) for name in names[1:])]
            for line in evaluated
        ],
    }


def best_possible(recipe: Any) -> float:
    """The highest true reward there is: of the best phrase alone, or of plain sentences alone."""
    from denserl_cli.core.sandbox.task import Task as SandboxTask

    return 1.0 if recipe.sandbox is None else SandboxTask(recipe.sandbox, recipe.seed).best


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")


if __name__ == "__main__":
    main()
