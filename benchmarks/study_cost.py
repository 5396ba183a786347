"""What a step of each method costs: passes by model, CPU time and memory, on the task `long`.

    python benchmarks/study_cost.py --to benchmarks/results/study/cost.json

Every arm of the factors source, action and advantage, and the base arms `segment` and `bandit`,
trains for a few iterations in a process of its own, one after the other. Counted is what an
iteration does from sampling to its last update; evaluations and checkpoints are left out. The
reward model is trained on few pairs and the second policy is the starting model: neither changes
what a step costs. With `--arms` those arms alone are measured, and replaced in the file. `study.py
report` prints the file beside the tables.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import study

ITERATIONS = 3
SMALLER = (
    *("sandbox.pairs=320", "data.eval_prompts=2", "ppo.eval_samples=1"),
    *(f"ppo.iterations={ITERATIONS}", f"ppo.eval_every={ITERATIONS}"),
    *(f"ppo.save_every={ITERATIONS}", "run.log_samples=0"),
)
FACTORS = ("source", "action", "advantage")
VARIED = (", lambda 1", ", KL 0.08")
"""Ends of the names of arms that do the same work as the arm without them."""


def arms(names: Sequence[str] | None = None) -> list[study.Arm]:
    """The arms to measure, in the order of the study; those of some names."""
    found = [
        arm._replace(settings=(*arm.settings, *SMALLER))
        for arm in study.grid(quick=False, seeds=[0])
        if arm.task == "long" and not arm.name.endswith(VARIED)
        if arm.factor in FACTORS or arm.name in ("segment", "bandit")
    ]
    return [arm for arm in found if names is None or arm.name in names]


class Meter:
    """Counts tokens of passes and CPU time while iterations run, and not between them."""

    def __init__(self) -> None:
        self.tokens: Counter[str] = Counter()
        self.watched: list[Any] = []
        self.seconds, self.iterations = 0.0, 0
        self.began: float | None = None
        self.sampling = False

    def watch(self, name: str, model: Any) -> None:
        """Count what goes through a model: its embedding is read once in every pass."""

        def passed(_module: Any, given: tuple[Any, ...], output: Any) -> None:
            if self.began is None:
                return
            count = given[0].numel()
            self.tokens[f"{name} {'sampling' if self.sampling else 'forward'}"] += count
            if output.requires_grad:
                output.register_hook(lambda _: self.tokens.update({f"{name} backward": count}))

        self.watched.append(model)
        model.get_input_embeddings().register_forward_hook(passed)

    def timed(self, collect: Callable[..., Any], conclude: Callable[..., Any]) -> tuple[Any, Any]:
        """The first and the last call of an iteration, which start and stop the meter."""

        def start(*given: Any) -> Any:
            self.began = time.process_time()
            return collect(*given)

        def stop(*given: Any) -> Any:
            assert self.began is not None
            self.seconds += time.process_time() - self.began
            self.began, self.iterations = None, self.iterations + 1
            return conclude(*given)

        return start, stop

    def sampled(self, sample: Callable[..., Any]) -> Callable[..., Any]:
        """The sampler's call, whose passes are counted apart."""

        def call(*given: Any, **options: Any) -> Any:
            self.sampling = True
            try:
                return sample(*given, **options)
            finally:
                self.sampling = False

        return call

    def found(self) -> dict[str, Any]:
        """Means over the iterations, and the highest resident set of this process."""
        count = max(self.iterations, 1)
        return {
            "iterations": self.iterations,
            "tokens": {name: round(self.tokens[name] / count) for name in sorted(self.tokens)},
            "cpu_seconds": round(self.seconds / count, 3),
            "peak_megabytes": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        }


def prepare(out: Path, arm: study.Arm) -> None:
    """Make the arm's starting model, reward model, normaliser and second policy."""
    for what in (study.sandbox_of, study.reward_model_of):
        if not what(out, arm).exists():
            study._prepare(what.__name__, out, arm, None)
    if study._needs_second(arm):
        start = study.sandbox_of(out, arm) / "sandbox" / "model"
        shutil.copytree(start, study.second_of(out, arm) / "policy", dirs_exist_ok=True)
    recipe, folder = study.recipe_of(out, arm), out / arm.task / arm.slug
    study._copied(study.reward_model_of(out, arm), folder)
    if recipe.ppo.uses_normalizer:
        study._stage("fit-function", recipe, folder)


def measure(out: Path, arm: study.Arm) -> dict[str, Any]:
    """Train the arm's policy in this process, with a meter beside it."""
    from denserl_cli.core.ppo.trainer import PPOTrainer
    from denserl_cli.core.stages import train_ppo

    meter, load = Meter(), train_ppo._models

    def watched(*given: Any, **options: Any) -> Any:
        collector, updater = load(*given, **options)
        scorer = collector.scorer
        held = [
            *(("policy", updater.actor), ("critic", updater.critic)),
            *(("reference", scorer.reference), ("reward model", scorer.reward_model)),
            *(("model of a source", one.model) for one in scorer.measures),
        ]
        for name, one in held:
            if one is not None and one.model not in meter.watched:
                meter.watch(name, one.model)
        collector.sampler.sample = meter.sampled(collector.sampler.sample)
        return collector, updater

    train_ppo._models = watched
    PPOTrainer.collect, PPOTrainer.conclude = meter.timed(PPOTrainer.collect, PPOTrainer.conclude)
    study._stage("train-ppo", study.recipe_of(out, arm), out / arm.task / arm.slug)
    return meter.found()


def _alone(function: Callable[..., Any], *given: Any) -> Any:
    """Call a function in a fresh process."""
    context = multiprocessing.get_context("spawn")
    with study.ProcessPoolExecutor(1, mp_context=context, initializer=study._end_with_us) as pool:
        return pool.submit(function, *given).result()


def main() -> None:
    """Measure all arms and write one file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--to", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--arms", nargs="+", help="names of the arms; all without it")
    asked = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    asked.to.parent.mkdir(parents=True, exist_ok=True)
    found = json.loads(asked.to.read_text(encoding="utf-8")) if asked.to.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        for arm in arms(asked.arms):
            _alone(prepare, Path(folder), arm)
            found[arm.name] = {"factor": arm.factor, **_alone(measure, Path(folder), arm)}
            print(f"{arm.name}: {found[arm.name]}", flush=True)
            asked.to.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
