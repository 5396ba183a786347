"""The plots of a report, one line for each run; metrics that no run has are left out."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.ndimage import uniform_filter1d

from denserl_cli.core.recipe.stages import TRAIN_PPO, TRAIN_RM
from denserl_cli.core.reporting.drawing import CYCLE, INK, MARKERS, QUIET, Plot, drawing, look
from denserl_cli.core.reporting.locations import pool
from denserl_cli.core.reporting.record import RunRecord, Series, is_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

POINTS = 400
"""Most points of a line; longer ones are averaged down to that."""
CURVES: Mapping[str, Mapping[str, tuple[str, str]]] = {
    TRAIN_RM: {
        "loss": ("loss", "nats a pair"),
        "accuracy": ("accuracy", "share of pairs"),
        "reward_std": ("spread of the scores", "std"),
        "gradient_norm": ("gradient norm", "before clipping"),
    },
    TRAIN_PPO: {
        "rm_score": ("reward model's score", "mean of the responses"),
        "dense_reward": ("dense reward of a response", "before the KL penalty"),
        "true_reward": ("true reward", "the task's own"),
        "kl": ("KL to the reference", "nats a response"),
        "entropy": ("policy entropy", "nats a token"),
        "response_length": ("response length", "tokens"),
        "segments_per_response": ("segments of a response", "count"),
        "terminated": ("responses that end by themselves", "share"),
        "clipped_rewards": ("clipped token rewards", "share"),
        "floored_segments": ("segments at the normaliser's floor", "share"),
        "explained_variance": ("returns foreseen by the critic", "share of variance"),
        "policy_clip_fraction": ("tokens outside the clip range", "share"),
        "mismatch_kl": ("KL of the sampler to the trainer", "nats a token"),
        "importance_capped": ("tokens whose importance weight is capped", "share"),
        "value_loss": ("value loss", "mean of the steps"),
        "kl_coef": ("adapted weight of the KL penalty", "coefficient"),
    },
}
"""Metric: its title, and its unit."""


def curves(runs: Sequence[RunRecord], stage: str) -> list[Plot]:
    """Each metric of a stage over its steps; held-out values as points on a dashed line."""
    found: list[Plot] = []
    x = "step" if stage == TRAIN_RM else "iteration"
    functions = {
        name: (function_title(name), "before its weight")
        for name in (reward_functions(runs) if stage == TRAIN_PPO else ())
    }
    for name, (title, unit) in {**functions, **CURVES[stage]}.items():
        if always_zero(runs, stage, name):
            continue
        with drawing(f"{stage}-{name}", title, found, x, unit) as axes:
            held = False
            for index, run in enumerate(runs):
                if name == "kl_coef" and run.setting("ppo.kl_target") is None:
                    continue  # the coefficient is constant
                _line(axes, run.series(stage, name), _named(run, runs), index, len(runs) == 1)
                held |= _held_out(axes, run.series(stage, f"eval_{name}"), index)
            if held:
                axes.plot([], [], "o--", color=QUIET, linewidth=1, label="held out")
            if name == "accuracy":
                _length_rule(axes, runs)
            if unit == "share":
                axes.set_ylim(bottom=0, top=max(axes.get_ylim()[1], 0.05))
    return found


def always_zero(runs: Sequence[RunRecord], stage: str, name: str) -> bool:
    """Whether a metric was recorded and is 0 at every step of every run: a plot shows nothing."""
    found = [run.series(stage, one) for run in runs for one in (name, f"eval_{name}")]
    return any(found) and not any(series.values.any() for series in found if series)


def accuracy_by_length(runs: Sequence[RunRecord]) -> list[Plot]:
    """How often the reward model is right, by how much longer the better response is."""
    found: list[Plot] = []
    bins = {_span(one): _middle(one) for run in runs for one in run.accuracy_by_length}
    spans = sorted(bins, key=lambda span: bins[span])
    x, title = "tokens by which the better response is longer", "accuracy by length difference"
    with drawing("accuracy-by-length", title, found, x, "accuracy", 0.28) as axes:
        for index, run in enumerate(run for run in runs if run.accuracy_by_length):
            at = [spans.index(_span(one)) for one in run.accuracy_by_length]
            heights = [one["accuracy"] for one in run.accuracy_by_length]
            width = 0.8 / len(runs)
            offset = (index - (len(runs) - 1) / 2) * width
            axes.bar(
                [index + offset for index in at],
                heights,
                width,
                color=CYCLE[index % len(CYCLE)],
                hatch=("", "///", "...", "xxx")[index % 4],
                alpha=0.8,
                label=run.label,
            )
            if len(runs) == 1:
                for bar, height, one in zip(at, heights, run.accuracy_by_length, strict=True):
                    axes.annotate(
                        f"{one['pairs']}", (bar, height), ha="center", va="bottom", size=7
                    )
        if spans:
            axes.axhline(0.5, color=QUIET, linewidth=1, linestyle=":")
            axes.set_xticks(range(len(spans)), spans, rotation=40, ha="right", size=7)
            axes.set_ylim(0, 1.1)
    return found


def normalizer_fit(runs: Sequence[RunRecord]) -> list[Plot]:
    """What fit-function measured by location, and the normaliser that it fitted."""
    found: list[Plot] = []
    for kind in ("mean", "std"):
        title, y = f"{kind} by location, as fitted", f"{kind} of segment rewards"
        with drawing(f"normalizer-{kind}", title, found, "location p", y) as axes:
            for index, run in enumerate(runs):
                _fit(axes, run, kind, index)
    return found


def rewards_by_location(runs: Sequence[RunRecord]) -> list[Plot]:
    """Segment rewards of the rollouts by location, before and after normalisation."""
    found: list[Plot] = []
    for kind, when in (("value", "before"), ("reward", "after")):
        title, y = f"{when} normalisation", "mean ± std of segment rewards"
        with drawing(f"locations-{when}", title, found, "location p", y) as axes:
            for index, run in enumerate(runs):
                lines = run.metrics.get(TRAIN_PPO, ())
                fifth = max(1, len(lines) // 5)
                parts = {"last fifth": lines[-fifth:]}
                if len(runs) == 1 and len(lines) > 2:
                    parts = {"first fifth of the training": lines[:fifth], **parts}
                for turn, (part, of) in enumerate(parts.items()):
                    label = run.label if len(runs) > 1 else part
                    _by_location(axes, of, kind, label, index + turn)
    return found


def reward_against_kl(runs: Sequence[RunRecord]) -> list[Plot]:
    """Rewards against the KL to the reference."""
    found: list[Plot] = []
    x, names = "KL to the reference, nats a response", ["rm_score", _paid(runs), "true_reward"]
    for name in dict.fromkeys([*reward_functions(runs), *names]):
        y = CURVES[TRAIN_PPO][name][0] if name in CURVES[TRAIN_PPO] else function_title(name)
        title = "score" if name == "rm_score" else y
        with drawing(f"kl-{name}", f"{title} against KL", found, x, y) as axes:
            for index, run in enumerate(runs):
                kl, reward = _together(run, "kl", name)
                if len(kl):
                    colour, marker = CYCLE[index % len(CYCLE)], MARKERS[index % len(MARKERS)]
                    axes.plot(kl, reward, color=colour, linewidth=0.6, alpha=0.5)
                    axes.scatter(
                        kl, reward, s=9, color=colour, marker=marker, label=_named(run, runs)
                    )
                    axes.plot(kl[-1:], reward[-1:], "*", color=INK, markersize=9)
            if axes.has_data():
                axes.plot([], [], "*", color=INK, label="end of the training")
    return found


def length_drift(runs: Sequence[RunRecord]) -> list[Plot]:
    """Lengths as multiples of those at the start, and the reward against the length."""
    found: list[Plot] = []
    names = {"response_length": "tokens", "segments_per_response": "segments",
             "segment_length": "tokens a segment"}  # fmt: skip
    y = "multiple of the start"
    with drawing("length-drift", "length drift", found, "iteration", y) as axes:
        for index, run in enumerate(runs):
            shown = names if len(runs) == 1 else {"response_length": f"{run.label}, tokens"}
            for turn, (name, label) in enumerate(shown.items()):
                series = _thinned(run.series(TRAIN_PPO, name))
                if series and series.values[0]:
                    values = series.values / series.values[0]
                    axes.plot(series.steps, values, label=label, **look(index + turn))
    name = _paid(runs)
    x, y = "tokens a response", CURVES[TRAIN_PPO][name][0]
    title = "score" if name == "rm_score" else y
    with drawing("length-reward", f"{title} against length", found, x, y) as axes:
        for index, run in enumerate(runs):
            length, reward = _together(run, "response_length", name)
            if len(length):
                colour, marker = CYCLE[index % len(CYCLE)], MARKERS[index % len(MARKERS)]
                axes.scatter(length, reward, s=9, color=colour, marker=marker, label=run.label)
    return found


def reward_functions(runs: Sequence[RunRecord]) -> list[str]:
    """The metrics of the sources of rewards that any run was trained with (`ppo.rewards`)."""
    names = dict.fromkeys(
        name for run in runs for line in run.metrics.get(TRAIN_PPO, ()) for name in line
    )
    found = [re.fullmatch(r"(?:eval_)?(reward_[\w.-]+)", name) for name in names]
    return list(dict.fromkeys(match[1] for match in found if match))


def function_title(name: str) -> str:
    """The title of a reward function's metric."""
    return f"reward {name.removeprefix('reward_')}"


def _paid(runs: Sequence[RunRecord]) -> str:
    """The reward that all runs have: the reward model's score, or else the dense reward."""
    without = [run for run in runs if not run.series(TRAIN_PPO, "rm_score")]
    dense = any(run.series(TRAIN_PPO, "dense_reward") for run in without)
    return "dense_reward" if dense else "rm_score"


def _named(run: RunRecord, runs: Sequence[RunRecord]) -> str:
    """The label of a run's line."""
    return run.label if len(runs) > 1 else "training"


def _line(axes: Axes, series: Series, label: str, index: int, alone: bool) -> None:
    """A metric of the training: as it is, and smoothed where it is long."""
    if not series:
        return
    shown = _thinned(series)
    if len(shown.values) < 20:
        axes.plot(*shown, marker="." if len(shown.values) < 3 else None, label=label, **look(index))
        return
    if alone:
        axes.plot(*shown, color=CYCLE[0], linewidth=0.7, alpha=0.35)
    smooth = uniform_filter1d(shown.values, max(3, len(shown.values) // 10), mode="nearest")
    axes.plot(shown.steps, smooth, label=label, **look(index))


def _held_out(axes: Axes, series: Series, index: int) -> bool:
    if series:
        colour, marker = CYCLE[index % len(CYCLE)], MARKERS[index % len(MARKERS)]
        axes.plot(*_thinned(series), color=colour, marker=marker, linestyle="--", linewidth=1)
    return bool(series)


def _length_rule(axes: Axes, runs: Sequence[RunRecord]) -> None:
    """The accuracy of preferring the longer response, as a horizontal line."""
    for index, run in enumerate(runs):
        rule = run.series(TRAIN_RM, "eval_longer_accuracy")
        if rule:
            colour = CYCLE[index % len(CYCLE)] if len(runs) > 1 else QUIET
            label = "'longer wins'" if index == 0 else None
            axes.axhline(rule.values[-1], color=colour, linestyle=":", linewidth=1, label=label)


def _fit(axes: Axes, run: RunRecord, kind: str, index: int) -> None:
    normalizer, style = run.normalizer, look(index)
    if normalizer is None:
        return
    points = np.array(run.measured).reshape(-1, 3)
    column = points[:, ("mean", "std").index(kind) + 1]
    axes.scatter(points[:, 0], column, s=7, alpha=0.4, color=style["color"])
    line = np.geomspace(min([0.01, *points[points[:, 0] > 0, 0]]), 1, 100)
    axes.plot(line, getattr(normalizer, kind)(line), label=run.label, **style)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")


def _by_location(axes: Axes, lines: Sequence[Any], kind: str, label: str, index: int) -> None:
    pooled = pool(lines, kind)
    if pooled is None:
        return
    there = pooled.segments > 0
    p, mean, std = pooled.middles[there], pooled.mean[there], pooled.std[there]
    marker = MARKERS[index % len(MARKERS)]
    axes.plot(p, mean, marker=marker, label=label, **look(index))
    axes.fill_between(p, mean - std, mean + std, color=look(index)["color"], alpha=0.12, lw=0)
    axes.set_xlim(0, 1)


def _together(run: RunRecord, *names: str) -> list[np.ndarray]:
    """Metrics of the iterations that have all of them."""
    found = [run.series(TRAIN_PPO, name) for name in names]
    steps = [set(series.steps) for series in found]
    common = sorted(set.intersection(*steps))
    return [series.values[np.isin(series.steps, common)] for series in found]


def _thinned(series: Series) -> Series:
    """At most `POINTS` points, each the mean of its neighbours."""
    count = len(series.values)
    if count <= POINTS:
        return series
    starts = np.linspace(0, count, POINTS, endpoint=False).astype(int)
    sizes = np.diff([*starts, count])
    return Series(*(np.add.reduceat(column, starts) / sizes for column in series))


def _span(one: Mapping[str, Any]) -> str:
    shortest, longest = one.get("shortest"), one.get("longest")
    if shortest is None:
        return f"≤ {longest}".replace("-", "−")
    if longest is None:
        return f"≥ {shortest}".replace("-", "−")
    span = str(shortest) if shortest == longest else f"{shortest} … {longest}"
    return span.replace("-", "−")


def _middle(one: Mapping[str, Any]) -> float:
    """A number to sort a bin by."""
    shortest, longest = one.get("shortest"), one.get("longest")
    if is_number(shortest):
        return float(shortest)  # type: ignore[arg-type]
    return float(longest) - 0.5 if is_number(longest) else 0.0  # type: ignore[arg-type]
