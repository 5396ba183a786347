"""Tables and plots of the study, from its raw results alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

Result = dict[str, Any]
BASE = "segment"
COST = "cost.json"
"""What an iteration of each arm costs, by study_cost.py, in the folder of the results."""
HEAD = (
    "arm | seeds | true reward, held out | minus segment, by seed | true reward of all samples | "
    "minus segment, by seed | KL | tokens | segments | RM accuracy"
)
DENSER = {
    "bandit": "segment",
    "token": "segment",
    "true reward, response": "true reward, segments",
}
"""What each arm is compared with."""


class Interval(NamedTuple):
    """A mean with its 95 % interval over seeds; NaN where there are too few."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        if np.isnan(self.low):
            return f"{self.mean:.3f}"
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def interval(values: Sequence[float]) -> Interval:
    """Mean and 95 % interval of Student's t."""
    array = np.asarray(values, dtype=float)
    if len(array) < 2:
        return Interval(float(array.mean()), np.nan, np.nan)
    found = stats.ttest_1samp(array, 0.0).confidence_interval(0.95)
    return Interval(float(array.mean()), float(found.low), float(found.high))


def report(results: Path, to: Path) -> None:
    """Write results.md and the plots of every task to a folder."""
    found = [
        json.loads(file.read_text(encoding="utf-8")) for file in sorted(results.glob("*/*.json"))
    ]
    to.mkdir(parents=True, exist_ok=True)
    parts = [f"## Segment against the others, by seed\n\n{comparison(found)}"]
    for (task,), of_task in _grouped(found, "task").items():
        best = np.mean([one["best_possible"] for one in of_task])
        start = np.mean([one["held_out"][0][1] for one in of_task])
        parts.append(
            f"## Task `{task}`\n\nTrue reward of the starting policy {start:.3f}, the best there "
            f"is {best:.3f}, on average over the runs.\n"
        )
        for (factor,), arms in _grouped(of_task, "factor").items():
            base = [one for one in of_task if one["arm"] == BASE and factor != one["factor"]]
            name = f"{task}-{factor.replace(' ', '-').lower()}.png"
            plot([*base, *arms], f"{task}: {factor}", to / name)
            parts.append(f"### {task}: {factor}\n\n{table([*base, *arms])}")
            parts.append(f"![{task}: {factor}]({name})\n")
    if (results / COST).exists():
        costs = json.loads((results / COST).read_text(encoding="utf-8"))
        parts.append(f"## What an iteration costs\n\n{cost_table(costs)}")
    (to / "results.md").write_text("\n".join(parts), encoding="utf-8")
    print("\n".join(part for part in parts if not part.startswith("!")))


def comparison(results: Sequence[Result]) -> str:
    """Dense minus less dense for each task and setting that has both, by seed."""
    rows = [
        "| task | what | seeds | held out, after training | all samples of training |",
        "|---|---|---|---|---|",
    ]
    by_arm = {(one["task"], one["arm"], one["seed"]): one for one in results}
    for (task, arm), runs in _grouped(results, "task", "arm").items():
        rival = next((name for name in DENSER if arm.startswith(name)), "")
        mine = DENSER.get(rival, "") + arm.removeprefix(rival)
        pairs = [(by_arm.get((task, mine, one["seed"])), one) for one in runs]
        pairs = [(one, other) for one, other in pairs if one is not None]
        if not rival or not pairs:
            continue
        cells = [task, f"{mine} − {arm}", str(len(pairs))]
        for figure in (_held_out, _all_samples):
            apart = [figure(one) - figure(other) for one, other in pairs]
            above = sum(value > 0 for value in apart)
            cells.append(f"{interval(apart)}, above 0 in {above} of {len(apart)}")
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows) + "\n"


def table(results: Sequence[Result]) -> str:
    """A row for each arm: means over its seeds, and differences to the base arm by seed."""
    base = {one["seed"]: one for one in results if one["arm"] == BASE}
    rows = [f"| {HEAD} |", "|" + "---|" * (HEAD.count("|") + 1)]
    for (arm,), runs in _grouped(results, "arm").items():
        cells = [arm, str(len(runs))]
        for figure in (_held_out, _all_samples):
            cells.append(str(interval([figure(one) for one in runs])))
            apart = [figure(one) - figure(base[one["seed"]]) for one in runs if one["seed"] in base]
            cells.append(str(interval(apart)) if apart and arm != BASE else "–")
        for name in ("kl", "response_length", "segments_per_response"):
            cells.append(f"{np.mean([_final(one, name) for one in runs]):.3g}")
        cells.append(f"{np.mean([one['rm_accuracy'] for one in runs]):.3f}")
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows) + "\n"


def cost_table(costs: dict[str, Result]) -> str:
    """A row for each arm of study_cost.py: thousand tokens through each model, CPU, memory."""
    names = list(dict.fromkeys(name for one in costs.values() for name in one["tokens"]))
    heads = [*(f"{name}, k tokens" for name in sorted(names)), "CPU seconds", "peak MB"]
    rows = [f"| arm | {' | '.join(heads)} |", "|" + "---|" * (len(heads) + 1)]
    for arm, one in costs.items():
        passes = [one["tokens"].get(name) for name in sorted(names)]
        cells = ["–" if count is None else f"{count / 1000:.1f}" for count in passes]
        cells += [f"{one['cpu_seconds']:.1f}", f"{one['peak_megabytes']}"]
        rows.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def plot(results: Sequence[Result], title: str, file: Path) -> None:
    """True reward by iteration and against KL, mean over seeds with the 95 % interval."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    by_step, by_kl = figure.subplots(1, 2, sharey=True)
    for (arm,), runs in _grouped(results, "arm").items():
        shortest = min(len(one["training"]) for one in runs)
        curves = np.stack([
            _smoothed(_column(one["training"], one, "true_reward")[:shortest]) for one in runs
        ])  # fmt: skip
        kls = np.stack([_smoothed(_column(one["training"], one, "kl")[:shortest]) for one in runs])
        spans = [interval(column) for column in curves.T]
        steps = np.arange(1, shortest + 1)
        (line,) = by_step.plot(steps, curves.mean(0), label=arm)
        by_step.fill_between(
            steps,
            [s.low for s in spans],
            [s.high for s in spans],
            color=line.get_color(),
            alpha=0.1,
        )
        by_kl.plot(kls.mean(0), curves.mean(0), color=line.get_color(), label=arm)
    by_step.set(xlabel="iteration", ylabel="true reward (training prompts)", title=title)
    by_kl.set(xlabel="KL to the reference, nats a response")
    by_step.legend(fontsize=7)
    figure.savefig(file, dpi=100)


def _held_out(result: Result) -> float:
    """The true reward on the held-out prompts after training."""
    return _final(result, "true_reward")


def _all_samples(result: Result) -> float:
    """The mean true reward of everything that was sampled in training: how soon it rose."""
    return float(_column(result["training"], result, "true_reward").mean())


def _final(result: Result, name: str) -> float:
    """A figure on the held-out prompts after training."""
    return float(_column(result["held_out"], result, name)[-1])


def _column(rows: Sequence[Sequence[float]], result: Result, name: str) -> np.ndarray:
    return np.array(rows, dtype=float)[:, result["columns"].index(name)]


def _smoothed(values: np.ndarray, width: int = 3) -> np.ndarray:
    """The mean of the last few iterations up to each one."""
    return np.array([values[max(0, k + 1 - width) : k + 1].mean() for k in range(len(values))])


def _grouped(results: Sequence[Result], *names: str) -> dict[tuple[str, ...], list[Result]]:
    """Results by some fields: the main tasks and arms first, the others by name."""

    def key(one: Result) -> tuple[str, ...]:
        return tuple(one[name] for name in names)

    def place(one: Result) -> list[tuple[int, str]]:
        return [(FIRST.index(word) if word in FIRST else len(FIRST), word) for word in key(one)]

    return {found: list(group) for found, group in groupby(sorted(results, key=place), key=key)}


FIRST = ("long", "medium", "short", "endings", "english", "granularity", "granularity in English",
         "segment", "token", "bandit")  # fmt: skip
