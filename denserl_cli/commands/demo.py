"""`denserl demo`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from denserl_cli.commands.common import (
    DryRunOption,
    OutOption,
    ResumeOption,
    SetOption,
    read_mode,
)

if TYPE_CHECKING:
    from denserl_cli.core.observer import Observer
    from denserl_cli.core.recipe import Recipe

EXAMPLE = "Example: denserl demo --out runs/demo"
RECIPE = "sandbox-segment"


def demo(
    overrides: SetOption = None,
    out: OutOption = None,
    resume: ResumeOption = None,
    dry_run: DryRunOption = False,
) -> None:
    """Run the whole pipeline on the embedded task: some minutes on a CPU, no download."""
    from denserl_cli.core.recipe import load_recipe
    from denserl_cli.core.recipe.stages import TRAINING

    recipe = load_recipe(RECIPE, overrides or ())
    folder = out or Path("runs/demo")
    if dry_run:
        from denserl_cli.launch.launcher import dry_run_text

        typer.echo("\n".join(dry_run_text(s, recipe, folder, read_mode(resume)) for s in TRAINING))
        return
    from denserl_cli.core.stages.run import run_stage
    from denserl_cli.terminal.dashboard import make_observer

    with make_observer() as observer:
        for stage in TRAINING:
            run_stage(stage, recipe, folder, read_mode(resume), observer)
        _look(recipe, folder, observer)


def _look(recipe: Recipe, folder: Path, observer: Observer) -> None:
    """Show segments, export both models, print what was learned and where everything is."""
    from denserl_cli.core.inspection.inspector import Inspector, answers_of, phrase_agreement
    from denserl_cli.core.runs.folder import RunFolder
    from denserl_cli.core.sandbox.task import Task
    from denserl_cli.core.stages.export import export
    from denserl_cli.terminal.console import print_table
    from denserl_cli.terminal.segments import print_segments

    assert recipe.sandbox is not None
    run = RunFolder(folder, recipe)
    inspector = Inspector(recipe, run, observer)
    responses = inspector.segment(answers_of(inspector.recipe, 100, observer))
    print_segments(responses[:2], inspector.cut.at_peaks)
    for part in ("reward-model", "policy"):
        export(part, recipe, run, folder / "export" / part, replace=True)
    reward, policy = run.summary("train-rm") or {}, run.summary("train-ppo") or {}
    agreement = phrase_agreement(recipe, responses)
    true, best = policy.get("eval_true_reward", {}), Task(recipe.sandbox, recipe.seed).best
    print_table(
        "what was learned",
        ["metric", "value"],
        [
            ["phrase boundaries found (precision)", agreement.precision],
            ["phrase boundaries found (recall)", agreement.recall],
            ["reward model accuracy", reward.get("eval_accuracy")],
            ["accuracy of 'prefer the longer'", reward.get("eval_longer_accuracy")],
            ["true reward before PPO", true.get("start")],
            ["true reward after PPO", true.get("end")],
            ["best possible true reward", best],
        ],
    )
    _report(folder)
    paths = {
        "run folder": folder,
        "report": folder / "report.html",
        "metrics of every step": folder / "metrics.jsonl",
        "sampled responses": folder / "samples.jsonl",
        "normaliser plot": run.normalizer.with_suffix(".png"),
        "reward model": folder / "export" / "reward-model",
        "policy": folder / "export" / "policy",
    }
    print_table("where it is", ["what", "path"], [[k, str(v)] for k, v in paths.items()])


def _report(folder: Path) -> None:
    from denserl_cli.core.reporting.record import read_runs
    from denserl_cli.core.reporting.report import make_report
    from denserl_cli.pages.report import write_page

    write_page(make_report(read_runs([folder])), folder / "report.html")
