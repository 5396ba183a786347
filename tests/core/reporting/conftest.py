"""Records and run folders made by hand."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from denserl_cli.core.normalizer import LocationNormalizer
from denserl_cli.core.reporting.record import RunRecord, StageRecord

MakeRecord = Callable[..., RunRecord]
PPO, RM = "train-ppo", "train-rm"


def lines(stage: str, **metrics: Sequence[Any]) -> list[dict[str, Any]]:
    """A line for each step, with the metrics that have a value for it."""
    steps = range(1, 1 + max(map(len, metrics.values())))
    return [
        {"stage": stage, "step": step}
        | {name: values[step - 1] for name, values in metrics.items() if step <= len(values)}
        for step in steps
    ]


@pytest.fixture
def ppo() -> MakeRecord:
    """Makes the record of a train-ppo with these metrics; `setting=` are fields of its recipe."""

    def make(setting: dict[str, Any] | None = None, **metrics: Sequence[Any]) -> RunRecord:
        return RunRecord(
            "run",
            Path("run"),
            recipe={"ppo": setting or {}},
            stages={PPO: StageRecord(finished=True, versions={"torch": "1"})},
            metrics={PPO: lines(PPO, **metrics)},
        )

    return make


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A run that has everything, of hostile text and several scripts."""
    return write_run(tmp_path / "run")


def write_run(folder: Path, *, iterations: int = 12, name: str = "made-up") -> Path:
    """Write a run folder by hand; the reward rises and so do length and segments."""
    folder.mkdir(parents=True)
    stage = {"status": "finished", "settings": {}, "summary": {}, "versions": {"torch": "2.13.0"},
             "processes": 2, "device": "CPU"}  # fmt: skip
    stages = {name: stage for name in (RM, "fit-function", PPO)}
    (folder / "run.json").write_text(json.dumps({"recipe": name, "stages": stages}))
    (folder / "recipe.yaml").write_text(
        f"name: {name}\nsegmentation: {{granularity: segment, cutoff: 1.5}}\n"
        "ppo: {segment_total: sum, kl_coef: 0.02}\n# <script>alert(1)</script>\n"
    )
    bins = [{"shortest": None, "longest": -1, "pairs": 40, "accuracy": 0.2},
            {"shortest": 0, "longest": 0, "pairs": 5, "accuracy": 0.6},
            {"shortest": 1, "longest": None, "pairs": 55, "accuracy": 0.9}]  # fmt: skip
    rm = lines(RM, loss=[0.7 - 0.01 * k for k in range(30)], accuracy=[0.6] * 30)
    rm[-1] |= {"eval_accuracy": 0.58, "eval_longer_accuracy": 0.55, "eval_lengths": bins}
    grown = [1 + 0.1 * k for k in range(iterations)]
    located = {"location_segments": [4, 0, 6], "location_value_mean": [1.0, None, 2.0],
               "location_value_std": [1.0, None, 1.0], "location_reward_mean": [0.0, None, 0.1],
               "location_reward_std": [1.0, None, 1.0]}  # fmt: skip
    ppo = lines(
        PPO,
        rm_score=grown,
        dense_reward=grown,
        kl=[2 * k for k in range(iterations)],
        kl_per_token=[0.01 * k for k in range(iterations)],
        entropy=[2.0] * iterations,
        response_length=[100 * g for g in grown],
        segments_per_response=[10 * g for g in grown],
        segment_length=[10.0] * iterations,
        terminated=[1.0] * iterations,
        clipped_rewards=[0.6] * iterations,
        floored_segments=[0.0] * iterations,
    )
    for line in ppo:
        line |= located
    evaluated = {"stage": PPO, "step": 0, "eval_rm_score": 0.5, "eval_kl": 0.0}
    ppo[-1] |= {"eval_rm_score": 2.0, "eval_kl": 20.0}
    everything = [*rm, evaluated, *ppo]
    write_lines(folder / "metrics.jsonl", everything)
    samples = [
        {"stage": PPO, "step": step, "held_out": True, "prompt": prompt, "segments": [
            {"text": "<script>alert(1)</script> ", "tokens": 4, "value": 1.0, "reward": 0.5},
            {"text": "naïve 😀 ​שלום\n```\x00", "tokens": 3, "value": -1.0, "reward": -0.25},
            {"text": "lone \ud83d half", "tokens": 1, "value": None, "reward": None},
        ]}
        for step in (0, iterations)
        for prompt in ("say <b>hi</b>", "another | prompt")
    ]  # fmt: skip
    write_lines(folder / "samples.jsonl", samples)
    record = {"table": [{"location": p, "mean": 1.0 + p, "std": 2.0} for p in (0.1, 0.5, 1.0)]}
    LocationNormalizer(0.4, 0.5, 1.8, 2.1).save(folder / "reward_model" / "normalizer.json", record)
    return folder


def write_lines(file: Path, found: Sequence[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(line) + "\n" for line in found))
