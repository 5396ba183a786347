"""The content of a report on one run or several: findings, tables, plots, samples."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from denserl_cli.core.recipe.document import to_yaml
from denserl_cli.core.recipe.stages import TRAIN_PPO, TRAIN_RM, TRAINING
from denserl_cli.core.reporting import plots
from denserl_cli.core.reporting.drawing import Plot
from denserl_cli.core.reporting.finding import Finding
from denserl_cli.core.reporting.findings import findings
from denserl_cli.core.reporting.record import RunRecord, Series
from denserl_cli.core.reporting.samples import Thread, threads
from denserl_cli.core.runs.settings import flat

OVERVIEW = (
    (TRAIN_RM, "accuracy", "reward model: accuracy"),
    (TRAIN_RM, "longer_accuracy", "accuracy of 'prefer the longer'"),
    (TRAIN_PPO, "rm_score", "reward model's score"),
    (TRAIN_PPO, "true_reward", "true reward"),
    (TRAIN_PPO, "kl", "KL, nats a response"),
    (TRAIN_PPO, "entropy", "policy entropy, nats a token"),
    (TRAIN_PPO, "response_length", "response length, tokens"),
    (TRAIN_PPO, "segments_per_response", "segments of a response"),
    (TRAIN_PPO, "terminated", "responses that end by themselves"),
)
"""Stage, metric, and its title in the overview."""
EXPECTED = {
    TRAIN_RM: {
        "eval_accuracy": "accuracy on held-out pairs (nothing was held out, or no evaluation yet)",
        "eval_lengths": "reward model accuracy by length difference; denserl evaluate rm makes up "
        "for it",
    },
    TRAIN_PPO: {
        "entropy": "policy entropy",
        "clipped_rewards": "the share of clipped rewards",
        "location_segments": "segment rewards by location",
        "eval_kl": "metrics on held-out prompts (nothing was held out, or no evaluation yet)",
    },
}
"""Metrics that a stage records, and what a report lacks without them."""


@dataclass(frozen=True)
class Table:
    """A table of texts."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Section:
    """A part of the page with plots about one subject. intro: how to read them."""

    title: str
    intro: str
    plots: Sequence[Plot]


@dataclass(frozen=True)
class RunPart:
    """What a report says about one run alone. missing: what its folder does not have."""

    label: str
    findings: Sequence[Finding]
    missing: Sequence[str]
    threads: Sequence[Thread]
    recipe: str


@dataclass(frozen=True)
class Report:
    """The content of a report. differences: between the recipes; None for a single run."""

    title: str
    overview: Table
    runs: Sequence[RunPart]
    sections: Sequence[Section]
    differences: Table | None
    versions: Table


def make_report(runs: Sequence[RunRecord]) -> Report:
    """Make the report on one run, or on several side by side."""
    single = len(runs) == 1
    return Report(
        title=" and ".join(run.label for run in runs) if len(runs) < 3 else f"{len(runs)} runs",
        overview=overview(runs) if single else turned(overview(runs)),
        runs=[_part(run, single) for run in runs],
        sections=[section for section in _sections(runs) if section.plots],
        differences=None if single else differences(runs),
        versions=versions(runs),
    )


def overview(runs: Sequence[RunRecord]) -> Table:
    """How far each run got, and its main metrics at the start and at the end.

    Where the last evaluation on held-out data lies behind the training, both are shown, with their
    steps: an interrupted run may have evaluated the untrained policy alone.
    """
    rows = [["recipe", *(str(run.setting("name") or "–") for run in runs)]]
    rows += [["rewards", *(_granularity(run) for run in runs)]]
    rows += [[stage, *(_status(run, stage) for run in runs)] for stage in TRAINING]
    functions = [
        (TRAIN_PPO, name, plots.function_title(name)) for name in plots.reward_functions(runs)
    ]
    for stage, name, title in (*OVERVIEW, *functions):
        held_out = [run.series(stage, f"eval_{name}") for run in runs]
        lags = any(map(_lags, runs, [stage] * len(runs), held_out))
        if any(held_out):
            cells = [_change(run, stage, f"eval_{name}") for run in runs]
            rows.append([f"{title}, held out", *(cell or "–" for cell in cells)])
        cells = [_change(run, stage, name, last=lags) for run in runs]
        if any(cells) and (lags or not any(held_out)):
            rows.append([title, *(cell or "–" for cell in cells)])
    return Table(["", *(run.label for run in runs)], rows)


def turned(table: Table) -> Table:
    """A table with a row for each of its columns, so that many runs fit and can be sorted."""
    columns = zip(table.columns, *table.rows, strict=True)
    _, *names = next(columns)
    return Table(["run", *names], [list(column) for column in columns])


def differences(runs: Sequence[RunRecord]) -> Table:
    """The recipe fields in which runs differ."""
    recipes = [flat(run.recipe) for run in runs]
    names = dict.fromkeys(name for recipe in recipes for name in recipe)
    rows = [[name, *(_value(recipe.get(name)) for recipe in recipes)] for name in names]
    return Table(
        ["field", *(run.label for run in runs)],
        [row for row in rows if len(set(row[1:])) > 1 and row[0] != "description"],
    )


def versions(runs: Sequence[RunRecord]) -> Table:
    """Device, processes and library versions of each run, by stage where they differ."""
    facts = [
        {
            name: {"device": stage.device, "processes": stage.processes, **stage.versions}
            for name, stage in run.stages.items()
        }
        for run in runs
    ]
    names = dict.fromkeys(name for of in facts for stage in of.values() for name in stage)
    rows = [
        [
            name,
            *(_by_stage({stage: found.get(name) for stage, found in of.items()}) for of in facts),
        ]
        for name in names
    ]
    return Table(["", *(run.label for run in runs)], rows)


def _part(run: RunRecord, single: bool) -> RunPart:
    limits = {} if single else {"steps": 2, "prompts": 2}
    return RunPart(
        label=run.label,
        findings=findings(run),
        missing=missing(run),
        threads=threads(run.samples, **limits),
        recipe=to_yaml(dict(run.recipe)) if run.recipe else "",
    )


def missing(run: RunRecord) -> list[str]:
    """What the folder does not have, in sentences for people."""
    said = list(run.notes)
    if not run.stages:
        said.append("no stage has been started")
    for stage, expected in EXPECTED.items():
        lines = run.metrics.get(stage, ())
        if stage in run.stages and not lines:
            said.append(f"{stage}: no metrics yet")
        for name, description in expected.items():
            if name == "location_segments" and not run.series(TRAIN_PPO, "rm_score"):
                continue  # no reward model has scored segments
            if lines and not any(line.get(name) is not None for line in lines):
                said.append(f"{stage} did not record {description}")
    if TRAIN_PPO in run.stages and not run.samples:
        said.append("no samples: train-ppo has written none (run.log_samples)")
    if any(not stage.versions for stage in run.stages.values()):
        said.append("library versions: an older denserl did not record them")
    return said


def _sections(runs: Sequence[RunRecord]) -> list[Section]:
    return [
        Section(
            "Reward model",
            "Accuracy is the share of pairs whose better response has the higher score. A reward "
            "model that is right only where the better response is the longer one has learned "
            "length.",
            [*plots.curves(runs, TRAIN_RM), *plots.accuracy_by_length(runs)],
        ),
        Section(
            "Normaliser",
            "Points: rewards of the segments at each location p = (k + 1) / K of the pairs that it "
            "was fitted to. Line: the normaliser, which levels off at its floor.",
            plots.normalizer_fit(runs),
        ),
        Section(
            "Policy",
            "Thin: each iteration; thick: a running mean; dashes: the held-out prompts, under the "
            "same noise each time." + _zero(runs),
            plots.curves(runs, TRAIN_PPO),
        ),
        Section(
            "Reward against KL",
            "The reward gained at each distance from the reference. Where the score rises and the "
            "true reward does not, the policy exploits the reward model.",
            plots.reward_against_kl(runs),
        ),
        Section(
            "Length drift",
            "Lengths as multiples of those at the start. A reward that rises with the length alone "
            "is no gain.",
            plots.length_drift(runs),
        ),
        Section(
            "Reward by location",
            "Segment rewards of the rollouts. Before normalisation they depend on the location in "
            "the response; after it, the first rollouts should have mean 0 and std 1 everywhere.",
            plots.rewards_by_location(runs),
        ),
    ]


def _zero(runs: Sequence[RunRecord]) -> str:
    """The metrics of train-ppo that have no plot since they are 0 throughout, as a sentence."""
    titles = [
        title
        for name, (title, _) in plots.CURVES[TRAIN_PPO].items()
        if plots.always_zero(runs, TRAIN_PPO, name)
    ]
    return f" Always 0: {', '.join(titles)}." if titles else ""


def _granularity(run: RunRecord) -> str:
    cutoff = run.setting("segmentation.cutoff")
    granularity = run.setting("segmentation.granularity") or "–"
    return f"{granularity}, cutoff {_value(cutoff)}" if granularity == "segment" else granularity


def _status(run: RunRecord, stage: str) -> str:
    if stage not in run.stages:
        return "not run"
    lines = run.metrics.get(stage, ())
    reached = f", {lines[-1]['step']} steps" if lines else ""
    return ("finished" if run.stages[stage].finished else "not finished") + reached


def _lags(run: RunRecord, stage: str, series: Series) -> bool:
    """Whether a metric ends before the last step that the stage has logged."""
    lines = run.metrics.get(stage, ())
    return bool(series) and bool(lines) and series.steps[-1] < lines[-1]["step"]


def _change(run: RunRecord, stage: str, name: str, *, last: bool = False) -> str:
    """A metric at the start and at the end; of train-rm at the end alone.

    last: its very last value with its step, instead of the mean over the last fifth.
    """
    series = run.series(stage, name)
    if not series:
        return ""
    lags = name.startswith("eval_") and _lags(run, stage, series)
    step = f" at step {series.steps[-1]:.0f}" if last or lags else ""
    if name.startswith("eval_") or last:
        before, after = series.values[0], series.values[-1]
    else:
        before, after = series.early, series.late
    if stage == TRAIN_RM or len(series.values) == 1:
        return f"{after:.4g}{step}"
    return f"{before:.4g} → {after:.4g}{step}"


def _by_stage(found: Mapping[str, object]) -> str:
    """One value where all stages have the same, else each stage's."""
    known = {name: str(value) for name, value in found.items() if value is not None}
    if len(set(known.values())) <= 1 and len(known) in (0, len(found)):
        return next(iter(known.values()), "–")
    return ", ".join(f"{value} ({name})" for name, value in known.items())


def _value(value: object) -> str:
    return "–" if value is None else json.dumps(value, ensure_ascii=False, default=str).strip('"')
