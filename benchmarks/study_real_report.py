"""Tables and figures of the study's chapter on real text, from its raw results alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.study_report import interval
from denserl_cli.core.normalizer import (
    LocationNormalizer,
    fit_location_normalizer,
    location_table,
)

Result = dict[str, Any]
Floats = NDArray[np.float64]
RESAMPLED = 2000
BINS = 20


def report(results: Path, to: Path) -> None:
    """Write real-text.md and its figures to a folder."""
    to.mkdir(parents=True, exist_ok=True)
    found = {
        part: [
            json.loads(file.read_text(encoding="utf-8"))
            for file in sorted((results / part).glob("*.json"))
        ]
        for part in ("rewards", "gold")
    }
    parts = ["# The study on real text: tables"]
    if found["rewards"]:
        parts += ["## Reward models", reward_models(found["rewards"])]
        segments = [one for one in found["rewards"] if one["arm"] == "segment"]
        if segments:
            parts += ["## The normaliser", normalisers(segments), "![](real-normaliser.png)"]
            plot_locations(segments, to / "real-normaliser.png")
    if found["gold"]:
        parts += ["## PPO under a gold reward", under_gold(found["gold"]), "![](real-gold.png)"]
        plot_gold(found["gold"], to / "real-gold.png")
    text = "\n\n".join(parts) + "\n"
    (to / "real-text.md").write_text(text, encoding="utf-8")
    print(text)


def reward_models(results: Sequence[Result]) -> str:
    """A row for each arm: accuracy, the same where the better answer is shorter, log loss."""
    characters = np.array(results[0]["characters"])
    shorter = characters[:, 0] < characters[:, 1]
    rows = [
        "| arm | seeds | accuracy | better answer shorter | better answer longer | log loss "
        "| log loss, best scale |",
        "|---|---|---|---|---|---|---|",
    ]
    longest = (characters[:, 0] > characters[:, 1]).astype(float)[None]
    rows.append(f"| prefer the longer | – | {bootstrapped(longest)} | 0.000 | 1.000 | – | – |")
    for arm, runs in by_arm(results).items():
        apart = np.array([one["scores"] for one in runs])
        apart = apart[..., 0] - apart[..., 1]
        right = (apart > 0).astype(float)
        cells = [
            *(arm, str(len(runs)), bootstrapped(right)),
            *(bootstrapped(right[:, shorter]), bootstrapped(right[:, ~shorter])),
            *(bootstrapped(log_loss(apart)), bootstrapped(best_scaled(apart))),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n\n".join([
        "\n".join(rows),
        f"{len(shorter)} held-out pairs, the better answer shorter in {shorter.sum()} of them. "
        f"Means with 95 % intervals of {RESAMPLED:,} bootstrap samples of seeds and pairs. A coin "
        "has a log loss of 0.693; the best scale is one factor for all, fitted to these pairs.",
    ])  # fmt: skip


def log_loss(apart: Floats) -> Floats:
    """The Bradley-Terry loss of each pair, in nats. apart: chosen - rejected, (seeds, pairs)."""
    return np.logaddexp(0, -apart)


def best_scaled(apart: Floats) -> Floats:
    """The loss of each pair once one factor for all scores of a model has been fitted."""
    from scipy.optimize import minimize_scalar

    rows = []
    for one in apart:
        spread = one.std() or 1.0
        found = minimize_scalar(
            lambda scale, one=one, spread=spread: log_loss(scale * one / spread).mean(),
            bounds=(0, 20),
            method="bounded",
        )
        rows.append(log_loss(found.x * one / spread))
    return np.array(rows)


def bootstrapped(values: Floats) -> str:
    """Mean with its 95 % interval over seeds and pairs. values: (seeds, pairs)."""
    rng = np.random.default_rng(0)
    seeds, pairs = values.shape
    means = [
        values[np.ix_(rng.integers(seeds, size=seeds), rng.integers(pairs, size=pairs))].mean()
        for _ in range(RESAMPLED)
    ]
    low, high = np.quantile(means, (0.025, 0.975))
    return f"{values.mean():.3f} [{low:.3f}, {high:.3f}]"


def normalisers(results: Sequence[Result]) -> str:
    """How well a constant, log p and a table of bins describe held-out rewards by location."""
    rows = [
        "| normaliser | R² of the means of the bins | R² of their standard deviations "
        "| R² of single rewards | log likelihood a reward |",
        "|---|---|---|---|---|",
    ]
    names = ("constant", "log p", f"table of {BINS} bins")
    measured = [described(one) for one in results]
    for name in names:
        figures = [str(interval([one[name][k] for one in measured])) for k in range(4)]
        rows.append(f"| {name} | {' | '.join(figures)} |")
    counts = [sum(map(len, one["held_out_values"])) for one in results]
    return "\n\n".join([
        "\n".join(rows),
        f"{len(results)} seeds, {min(counts):,} or more held-out segments each; fitted to the "
        "segments of 300 pairs that the reward model was trained on. Means with 95 % intervals of "
        "Student's t over seeds. Bins hold equally many segments.",
    ])  # fmt: skip


def described(result: Result) -> dict[str, tuple[float, float, float, float]]:
    """For each way to describe rewards by location: three R², and the log likelihood."""
    fitted, held = located(result["fitted_values"]), located(result["held_out_values"])
    edges = np.quantile(held[0], np.linspace(0, 1, BINS + 1)[1:-1])
    place = np.searchsorted(edges, held[0])
    own = np.searchsorted(edges, fitted[0])
    line: LocationNormalizer = fit_location_normalizer(*fitted)
    means, stds = (moments(fitted[1], own, how) for how in (np.mean, np.std))
    ways: dict[str, tuple[Floats, Floats]] = {
        "constant": (
            np.full(len(place), fitted[1].mean()), np.full(len(place), fitted[1].std()),
        ),
        "log p": (line.mean(held[0]), line.std(held[0])),
        f"table of {BINS} bins": (means[place], stds[place]),
    }  # fmt: skip
    of_bins = [moments(held[1], place, how)[place] for how in (np.mean, np.std)]
    return {
        name: (
            r2(of_bins[0], mean),
            r2(of_bins[1], std),
            r2(held[1], mean),
            float(np.mean(-0.5 * ((held[1] - mean) / std) ** 2 - np.log(std))),
        )
        for name, (mean, std) in ways.items()
    }


def located(values: Sequence[Sequence[float]]) -> tuple[Floats, Floats]:
    """Locations (k+1)/K and values of all segments."""
    locations = [np.arange(1, len(one) + 1) / len(one) for one in values]
    return np.concatenate(locations), np.concatenate([np.array(one) for one in values])


def moments(values: Floats, bins: NDArray[np.int64], how: Callable[..., Any]) -> Floats:
    """Of each bin, the mean or the standard deviation; that of all values where it is empty."""
    return np.array([
        how(values[bins == b]) if (bins == b).any() else how(values) for b in range(BINS)
    ])  # fmt: skip


def r2(measured: Floats, told: Floats) -> float:
    """Share of the variance of what was measured that is told."""
    return float(1 - ((measured - told) ** 2).sum() / ((measured - measured.mean()) ** 2).sum())


def under_gold(results: Sequence[Result]) -> str:
    """A row for each proxy: gold reward, proxy reward and KL on held-out prompts."""
    rows = [
        "| proxy | seeds | gold reward before | after | change | KL, nats | tokens | segments |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for arm, runs in by_arm(results).items():
        columns = runs[0]["columns"]
        first, last = (
            {name: [one["held_out"][k][columns.index(name)] for one in runs] for name in columns}
            for k in (0, -1)
        )
        change = np.subtract(last["reward_gold"], first["reward_gold"])
        cells = [
            *(arm, str(len(runs)), str(interval(first["reward_gold"]))),
            *(str(interval(last["reward_gold"])), str(interval(list(change)))),
            *(str(interval(last["kl"])), f"{np.mean(last['response_length']):.0f}"),
            f"{np.mean(last['segments_per_response']):.0f}",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def by_arm(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Results by their arm, in the order of their files."""
    arms: dict[str, list[Result]] = {}
    for one in results:
        arms.setdefault(one["arm"], []).append(one)
    return arms


def plot_locations(results: Sequence[Result], file: Path) -> None:
    """Mean and standard deviation of held-out rewards by location, before and after."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True)
    for color, one in enumerate(results):
        line = fit_location_normalizer(*located(one["fitted_values"]))
        place, values = located(one["held_out_values"])
        after = (values - line.mean(place)) / line.std(place)
        for row, rewards in enumerate((values, after)):
            table = location_table(place, rewards)
            for column, name in enumerate(("mean", "std")):
                axes[row][column].scatter(
                    table.location, getattr(table, name), s=6, alpha=0.4, color=f"C{color}"
                )
        smooth = np.geomspace(place.min(), 1, 200)
        for column, how in enumerate((line.mean, line.std)):
            axes[0][column].plot(
                smooth, how(smooth), color=f"C{color}", label=f"seed {one['seed']}"
            )
    for row, when in enumerate(("before", "after")):
        for column, name in enumerate(("mean", "standard deviation")):
            axes[row][column].set(ylabel=f"{name} {when}", xscale="log")
    for axis in axes[1]:
        axis.set(xlabel="location p")
    axes[0][0].legend(fontsize=7)
    figure.savefig(file, dpi=100)


def plot_gold(results: Sequence[Result], file: Path) -> None:
    """Gold reward by iteration and against KL, mean over seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    by_step, by_kl = figure.subplots(1, 2, sharey=True)
    for arm, runs in by_arm(results).items():
        columns, length = runs[0]["columns"], min(len(one["training"]) for one in runs)
        curves = np.array([one["training"][:length] for one in runs], dtype=float)
        gold, kl = (curves[..., columns.index(name)] for name in ("reward_gold", "kl"))
        spans = [interval(list(column)) for column in gold.T]
        (drawn,) = by_step.plot(np.arange(1, length + 1), gold.mean(0), label=arm)
        low, high = [s.low for s in spans], [s.high for s in spans]
        by_step.fill_between(
            np.arange(1, length + 1), low, high, color=drawn.get_color(), alpha=0.1
        )
        by_kl.plot(kl.mean(0), gold.mean(0), color=drawn.get_color(), label=arm)
    by_step.set(xlabel="iteration", ylabel="gold reward (training prompts)")
    by_kl.set(xlabel="KL to the reference, nats a response")
    by_step.legend(fontsize=7)
    figure.savefig(file, dpi=100)
