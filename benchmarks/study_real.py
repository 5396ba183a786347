"""The study's chapter on real text: reward models, the normaliser and PPO with SmolLM2-135M.

    python benchmarks/study_real.py run --model runs/real/model --preferences train.jsonl \
        --held-out eval.jsonl --out runs/study-real [--parts rewards] [--seeds 0]
    python benchmarks/study_real.py report --results benchmarks/results/study-real --to docs/study

`run` leaves one small JSON file of every training in the results folder; killed and started again,
it goes on where it was, also within a training. Its parts:

rewards  Every arm's reward model on the same pairs, and its scores of the held-out ones.
gold     PPO against proxies of a gold reward model, which alone has read people's preferences:
         it labels samples of the starting model, and the proxies learn from those labels.

`report` makes tables and figures from these files alone.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.study_real_report import report

RECIPE = "smollm2-segment"
SEEDS = (0, 1, 2)
PAIRS, CURVE, GOLD_PAIRS = 1500, 100, 2500
"""Pairs that proxies and other arms learn from, those of the learning curve, and the gold's own."""
SIZES = ("data.max_length=256", "data.max_prompt_length=128")
REWARD = (*SIZES, f"data.eval_pairs={CURVE}", "reward_model.batch_size=16",
          "reward_model.eval_every=25")  # fmt: skip
PPO = (
    *("ppo.iterations=12", "ppo.rollout.batch_size=32", "ppo.train_batch_size=16"),
    *("ppo.rollout.max_new_tokens=64", "ppo.max_prompt_length=128"),
    *("data.eval_prompts=48", "ppo.eval_samples=2", "ppo.eval_every=12", "ppo.save_every=2"),
)
NO_CUTOFF = ("segmentation.cutoff=null", "segmentation.segment_length=null")
GRANULARITIES = {
    name: (f"segmentation={{granularity: {name}}}", *NO_CUTOFF) for name in ("bandit", "token")
}
ARMS: dict[str, tuple[str, ...]] = {
    "segment": (),
    **GRANULARITIES,
    "sentence": ("segmentation={cut: sentence}", *NO_CUTOFF),
    "fixed 8": ("segmentation={cut: fixed, segment_length: 8}", "segmentation.cutoff=null"),
    "random 8": ("segmentation={cut: random, segment_length: 8}", "segmentation.cutoff=null"),
    "untrained head": ("reward_model.learning_rate=1e-12", "reward_model.epochs=0.02"),
}
"""The reward models, around the recipe `smollm2-segment`."""
LIKELIHOOD = "log-probability of the start"
"""Not trained: the mean log-probability of an answer's tokens under the starting model."""
PROXIES = ("segment", "token", "bandit")
DENSERL = (sys.executable, "-m", "denserl_cli.app")
SIDES = ("chosen", "rejected")
COLUMNS = ("step", "reward_gold", "rm_score", "kl", "response_length", "segments_per_response")


class Job(NamedTuple):
    """One training whose result is kept: its part of the study, its arm and its seed."""

    part: str
    arm: str
    seed: int

    @property
    def file(self) -> str:
        """Where its result is kept, within the results folder."""
        return f"{self.part}/{self.arm.replace(' ', '-')}-{self.seed}.json"


def main() -> None:
    """Train what has no result yet, or report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run")
    running.add_argument(
        "--model", type=Path, required=True, help="folder of SmolLM2-135M-Instruct"
    )
    running.add_argument("--preferences", type=Path, required=True)
    running.add_argument("--held-out", type=Path, required=True, help="pairs with other prompts")
    running.add_argument("--out", type=Path, required=True, help="where the runs go")
    running.add_argument("--results", type=Path, help="where results go; OUT/results without it")
    running.add_argument("--parts", nargs="+", choices=("rewards", "gold"))
    running.add_argument("--arms", nargs="+", choices=[*ARMS, LIKELIHOOD])
    running.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    running.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    reporting = commands.add_parser("report")
    reporting.add_argument("--results", type=Path, required=True)
    reporting.add_argument("--to", type=Path, required=True, help="where tables and figures go")
    asked = parser.parse_args()
    if asked.command == "report":
        report(asked.results, asked.to)
        return
    study = Study(asked.model.resolve(), asked.out.resolve(), asked.results)
    study.split(asked.preferences, asked.held_out)
    jobs = [
        job
        for job in grid(asked.seeds)
        if job.part in (asked.parts or [job.part]) and job.arm in (asked.arms or [job.arm])
        if not (study.results / job.file).exists()
    ]
    with ThreadPoolExecutor(asked.jobs) as pool:
        try:
            for number, done in enumerate(pool.map(study.run, jobs), 1):
                print(f"{time.strftime('%H:%M:%S')}  {done}; {len(jobs) - number} left", flush=True)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def grid(seeds: Sequence[int]) -> list[Job]:
    """Everything that is trained, in the order in which a study that is cut short says most."""
    arms = [Job("rewards", arm, seed) for seed in seeds for arm in ARMS]
    return [
        *sorted(arms, key=lambda job: job.arm not in PROXIES),
        Job("rewards", LIKELIHOOD, 0),
        *(Job("gold", arm, seed) for seed in seeds for arm in PROXIES),
    ]


class Study:
    """The files of a study, and how its parts are made."""

    def __init__(self, model: Path, out: Path, results: Path | None) -> None:
        self.model, self.out = model, out
        self.results = results or out / "results"
        self.lock = threading.Lock()
        """Held while what several trainings share is made."""

    def split(self, preferences: Path, held_out: Path) -> None:
        """Write the pairs of the proxies, those of the gold reward model, and the held-out ones."""
        self.out.mkdir(parents=True, exist_ok=True)
        lines = preferences.read_text(encoding="utf-8").splitlines(keepends=True)
        own = PAIRS + CURVE
        _write(self.out / "pairs.jsonl", lines[:own])
        _write(self.out / "gold-pairs.jsonl", lines[own : own + GOLD_PAIRS + CURVE])
        held = held_out.read_text(encoding="utf-8").splitlines(keepends=True)
        _write(self.out / "held-out.jsonl", held)
        prompts = [json.loads(line)["chosen"][:-1] for line in [*lines[:own], *held]]
        asked = {json.dumps({"prompt": prompt}) + "\n": None for prompt in prompts}
        _write(self.out / "prompts.jsonl", list(asked))

    def run(self, job: Job) -> str:
        """Train one arm and keep its result."""
        found = {"rewards": self.rewards, "gold": self.gold}[job.part](job)
        file = self.results / job.file
        file.parent.mkdir(parents=True, exist_ok=True)
        aside = file.with_suffix(".tmp")
        aside.write_text(json.dumps({**job._asdict(), **found}) + "\n", encoding="utf-8")
        aside.replace(file)
        return job.file

    def rewards(self, job: Job) -> dict[str, Any]:
        """A reward model's scores of the held-out pairs; the segment model's values, too."""
        if job.arm == LIKELIHOOD:
            return self.log_probabilities()
        settings = [
            *(f"model.path={self.model}", f"data.preferences={self.out / 'pairs.jsonl'}"),
            *(f"seed={job.seed}", *REWARD, *ARMS[job.arm]),
        ]
        folder = self.out / "rewards" / Path(job.file).stem
        self._denserl("train-rm", settings, folder, "--resume")
        rows = self._scored(settings, folder, self.out / "held-out.jsonl")
        found = {} if job.arm != "segment" else {
            "held_out_values": _values(rows),
            "fitted_values": _values(
                self._scored(settings, folder, self.out / "pairs.jsonl", limit=300)
            ),
        }  # fmt: skip
        curve = [
            [line["step"], line["eval_accuracy"], line["eval_loss"]]
            for line in _lines(folder / "metrics.jsonl")
            if line["stage"] == "train-rm" and "eval_accuracy" in line
        ]
        return {
            "settings": settings[2:],
            "curve": [[_short(value) for value in point] for point in curve],
            "scores": [[_short(row[f"score_{side}"]) for side in SIDES] for row in rows],
            "characters": _characters(rows),
            **found,
        }

    def log_probabilities(self) -> dict[str, Any]:
        """The mean log-probability of the held-out answers under the starting model."""
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from denserl_cli.core.chat.format import ChatFormat
        from denserl_cli.core.recipe import load_recipe

        limit = load_recipe(RECIPE, SIZES).data.max_length
        chat = ChatFormat.of(AutoTokenizer.from_pretrained(self.model))
        model = AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32).eval()
        rows = _lines(self.out / "held-out.jsonl")

        def mean(messages: list[dict[str, str]]) -> float:
            prompt, response = chat.encode_answer(messages)
            ids = torch.tensor([*prompt, *response])[None, :limit]
            with torch.inference_mode():
                logits = model(ids[:, :-1]).logits[0, len(prompt) - 1 :]
            told = logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None])
            return float(told.mean())

        scores = [[_short(mean(row[side])) for side in SIDES] for row in rows]
        return {"scores": scores, "characters": _characters(rows)}

    def gold(self, job: Job) -> dict[str, Any]:
        """The learning curve of PPO against a proxy: gold reward and KL."""
        gold, labelled = self.gold_reward_model(), self.labelled(job.seed)
        score = f"{{source: score, model: '{gold / 'reward_model'}', weight: 0, name: gold}}"
        settings = [
            *(f"model.path={self.model}", f"data.preferences={labelled}"),
            *(f"data.prompts={self.out / 'prompts.jsonl'}", f"ppo.rewards=[values, {score}]"),
            *(f"seed={job.seed}", *REWARD, *PPO, *ARMS[job.arm]),
        ]
        folder = self.out / "gold" / Path(job.file).stem
        for stage in ("train-rm", "fit-function", "train-ppo"):
            self._denserl(stage, settings, folder, "--resume")
        lines = [line for line in _lines(folder / "metrics.jsonl") if line["stage"] == "train-ppo"]
        names = COLUMNS[1:]
        held = [line for line in lines if "eval_reward_gold" in line]
        return {
            "settings": settings[4:],
            "columns": list(COLUMNS),
            "training": [
                [line["step"], *(_short(line[name]) for name in names)]
                for line in lines
                if "reward_gold" in line
            ],
            "held_out": [
                [line["step"], *(_short(line[f"eval_{name}"]) for name in names)] for line in held
            ],
        }

    def gold_reward_model(self) -> Path:
        """The run folder of the gold reward model: one score a response, from people's pairs."""
        folder = self.out / "gold" / "gold"
        with self.lock:
            self._denserl("train-rm", self._gold_settings(), folder, "--resume")
        return folder

    def labelled(self, seed: int) -> Path:
        """Pairs of the starting model's own samples, labelled by the gold reward model."""
        gold, file = self.gold_reward_model(), self.out / "gold" / f"labelled-{seed}.jsonl"
        with self.lock:
            if not file.exists():
                settings = [*self._gold_settings(), *PPO, "normalizer.kind=none", f"seed={seed}"]
                prompts = ("--data", str(self.out / "prompts.jsonl"))
                self._denserl(
                    "evaluate policy", settings, gold, "--policy", "start", "--n", "2", *prompts
                )
                _write(file, _ranked(_lines(gold / "evaluation" / "policy-samples.jsonl")))
        return file

    def _gold_settings(self) -> list[str]:
        pairs = f"data.preferences={self.out / 'gold-pairs.jsonl'}"
        return [f"model.path={self.model}", *REWARD, *GRANULARITIES["bandit"], "seed=100", pairs]

    def _scored(
        self, settings: Sequence[str], folder: Path, pairs: Path, limit: int | None = None
    ) -> list[dict[str, Any]]:
        """Rows with their scores and the values of their segments."""
        given, to = folder / "to-score.jsonl", folder / f"scored-{pairs.name}"
        _write(given, pairs.read_text(encoding="utf-8").splitlines(keepends=True)[:limit])
        self._denserl("score", settings, folder, "--data", str(given), "--to", str(to), "--fresh")
        return _lines(to)

    def _denserl(self, command: str, settings: Sequence[str], folder: Path, *further: str) -> None:
        """Run a command in a process of its own; its output goes to a file of the run's."""
        recipe = ["--recipe", RECIPE, "--out", str(folder)]
        overrides = [word for setting in settings for word in ("--set", setting)]
        log = self.out / "logs" / f"{folder.parent.name}-{folder.name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as out:
            done = subprocess.run(
                [*DENSERL, *command.split(), *recipe, *overrides, *further],
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=out,
                stderr=subprocess.STDOUT,
                check=False,
            )
        if done.returncode:
            raise SystemExit(f"denserl {command} failed; see {log}")


def _ranked(samples: Sequence[dict[str, Any]]) -> list[str]:
    """Pairs of the best and the worst sample of each prompt, by the gold reward; ties left out."""
    of_prompt: dict[str, list[dict[str, Any]]] = {}
    for line in samples:
        of_prompt.setdefault(json.dumps(line["messages"][:-1]), []).append(line)
    pairs = []
    for answers in of_prompt.values():
        worst, *_, best = sorted(answers, key=lambda one: one["rm_score"])
        if best["rm_score"] > worst["rm_score"]:
            pairs.append({"chosen": best["messages"], "rejected": worst["messages"]})
    return [json.dumps(pair) + "\n" for pair in pairs]


def _characters(rows: Sequence[dict[str, Any]]) -> list[list[int]]:
    return [[len(row[side][-1]["content"]) for side in SIDES] for row in rows]


def _values(rows: Sequence[dict[str, Any]]) -> list[list[float]]:
    """The reward model's value of every segment of every answer."""
    return [
        [_short(one["value"]) for one in row[f"segments_{side}"]] for row in rows for side in SIDES
    ]


def _lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def _write(file: Path, lines: Sequence[str]) -> None:
    aside = file.with_name(f".{file.name}")
    aside.write_text("".join(lines), encoding="utf-8")
    aside.replace(file)


def _short(value: float) -> float:
    return float(f"{value:.4g}")


if __name__ == "__main__":
    main()
