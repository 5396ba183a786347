"""`denserl evaluate rm | policy`."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from denserl_cli.commands.common import (
    DryRunOption,
    JsonOption,
    OutOption,
    PreferencesOption,
    ProcessesOption,
    PromptsOption,
    RecipeOption,
    SetOption,
    print_plan,
    read_recipe,
)
from denserl_cli.commands.help import App

if TYPE_CHECKING:
    from denserl_cli.core.evaluation.tables import Table
    from denserl_cli.core.recipe import Recipe

app = App(no_args_is_help=True, help="Evaluate a reward model or a policy.")


class Benchmark(StrEnum):
    """Data that others publish the scores of reward models on."""

    REWARD_BENCH = "reward-bench"
    REWARD_BENCH_2 = "reward-bench-2"
    RM_BENCH = "rm-bench"
    JUDGE_BENCH = "judgebench"


_HUB = {
    Benchmark.REWARD_BENCH: "{path: allenai/reward-bench, split: filtered}",
    Benchmark.REWARD_BENCH_2: "{path: allenai/reward-bench-2, split: test}",
    Benchmark.RM_BENCH: "{path: THU-KEG/RM-Bench, split: train}",
    Benchmark.JUDGE_BENCH: "{path: ScalerLab/JudgeBench, split: gpt}",
}
"""Where the hub has a benchmark's rows."""


LimitOption = Annotated[
    int | None, typer.Option("--limit", min=1, help="Use at most so many of the rows.")
]


@app.command("rm", epilog="Example: denserl evaluate rm --recipe sandbox-segment")
def rm(
    recipe: RecipeOption,
    overrides: SetOption = None,
    out: OutOption = None,
    data: PreferencesOption = None,
    benchmark: Annotated[
        Benchmark | None,
        typer.Option(
            "--benchmark", help="Its rows and metrics; rows from --data, else from the hub."
        ),
    ] = None,
    limit: LimitOption = None,
    as_json: JsonOption = False,
    dry_run: DryRunOption = False,
    processes: ProcessesOption = None,
) -> None:
    """Accuracy, calibration and length bias of a run's reward model, or a benchmark's score."""
    settings = list(overrides or ())
    if benchmark is not None and data is None:
        settings.insert(0, f"data.evaluation=[{_HUB[benchmark]}]")
    loaded = read_recipe("evaluate-rm", recipe, settings, data=data)
    folder = out or Path("runs") / loaded.name
    if dry_run:
        print_plan("evaluate rm", loaded, folder)
        return
    name = benchmark or _file_name(data) or ("evaluation" if loaded.data.evaluation else "held-out")
    options = {"name": name, "limit": limit, "benchmark": benchmark}
    result = _evaluate("evaluate-rm", loaded, folder, processes, options)
    if result is not None:
        from denserl_cli.core.evaluation.tables import benchmark_tables, pair_tables

        tables = benchmark_tables if "parts" in result else pair_tables
        _print(result, tables(result), as_json)


@app.command("policy", epilog="Example: denserl evaluate policy --recipe sandbox-segment --n 8")
def policy(
    recipe: RecipeOption,
    overrides: SetOption = None,
    out: OutOption = None,
    data: PromptsOption = None,
    path: Annotated[
        str | None,
        typer.Option("--policy", metavar="PATH_OR_HUB_NAME", help="Another policy than the run's."),
    ] = None,
    samples: Annotated[
        int, typer.Option("--n", min=1, help="Responses of either policy to each prompt.")
    ] = 8,
    limit: LimitOption = None,
    as_json: JsonOption = False,
    dry_run: DryRunOption = False,
    processes: ProcessesOption = None,
) -> None:
    """Reward, KL and length of a policy beside best-of-n of the one it started from."""
    loaded = read_recipe("evaluate-policy", recipe, overrides, data=data)
    folder = out or Path("runs") / loaded.name
    if dry_run:
        print_plan("evaluate policy", loaded, folder)
        return
    options = {"policy": path, "samples": samples, "limit": limit, "held_out": data is None}
    result = _evaluate("evaluate-policy", loaded, folder, processes, options)
    if result is None:
        return
    from denserl_cli.core.evaluation.tables import equivalence, policy_tables

    _print(result, policy_tables(result), as_json)
    if not as_json:
        typer.echo(equivalence(result))


def _evaluate(
    stage: str, recipe: Recipe, folder: Path, count: int | None, options: dict[str, Any]
) -> dict[str, Any] | None:
    """Run an evaluation in so many processes; its metrics, where this process is to show them."""
    from denserl_cli.launch.launcher import launch_evaluation
    from denserl_cli.launch.processes import read_processes

    processes = read_processes(count, 1, None, None)
    return launch_evaluation(stage, recipe, folder, processes, options)


def _print(result: dict[str, Any], tables: Sequence[Table], as_json: bool) -> None:
    from denserl_cli.terminal.console import print_table

    if as_json:
        typer.echo(json.dumps(result, ensure_ascii=False))
        return
    for title, columns, rows in tables:
        print_table(title, columns, rows)


def _file_name(data: str | None) -> str | None:
    """A name for the result on this data: the file's without its ending, or the hub's."""
    if data is None:
        return None
    name = re.sub(r"\.(jsonl|json|parquet)$", "", data.rstrip("/"))
    name = name if name.count("/") == 1 and not name.startswith((".", "~")) else Path(name).name
    return re.sub(r"[^\w.-]+", "-", name).strip(".-") or "data"
