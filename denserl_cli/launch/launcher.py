"""Start a stage in this process or in several, or show what it would do."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from denserl_cli.core.planning.dry_run import chat_lines, plan_lines
from denserl_cli.core.planning.workload import check_batches
from denserl_cli.core.recipe import Recipe, recipe_to_yaml
from denserl_cli.core.recipe.stages import StageName
from denserl_cli.core.runs.folder import Mode, RunFolder
from denserl_cli.core.runs.trackers import check_trackers
from denserl_cli.core.system.distributed import is_main_process
from denserl_cli.launch.hostfile import read_hosts
from denserl_cli.launch.processes import Processes
from denserl_cli.launch.ssh import host_command, run_hosts
from denserl_cli.launch.torchrun import run_processes, worker_words


def launch(
    stage: StageName,
    recipe: Recipe,
    *,
    out: Path | None,
    mode: Mode,
    dry_run: bool,
    processes: Processes | None = None,
) -> None:
    """Run a stage of the recipe in its run folder.

    out: the run folder; None: `runs/<recipe.name>`. mode: what to do with what an earlier run left
    there. dry_run: print the plan instead, as YAML with comments. processes: None: one.

    Raises DenserlError when the batches do not fit the processes or a tracker is not installed.
    """
    folder, processes = out or Path("runs") / recipe.name, processes or Processes()
    check_batches(stage, recipe, processes.world_size)
    check_trackers(recipe)
    if dry_run:
        if is_main_process():
            print(dry_run_text(stage, recipe, folder, mode, processes))
    elif processes.hostfile:
        run_hosts(processes.hostfile, stage, recipe, folder, mode)
    elif processes.world_size > 1 and not processes.started:
        run_processes(processes, stage, recipe, folder, mode)
    else:
        from denserl_cli.launch.worker import ended_by_errors, work

        with ended_by_errors() if processes.world_size > 1 else nullcontext():
            work(stage, recipe, folder, mode)


def launch_evaluation(
    stage: str, recipe: Recipe, folder: Path, processes: Processes, options: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Evaluate the reward model or the policy of a run; returns the metrics to show.

    options: of the evaluation itself, with `name` where its metrics have one. Returns None in a
    process, started by another launcher, that is not to speak.
    """
    if processes.world_size > 1 and not processes.started:
        run_processes(processes, stage, recipe, folder, "start", options)
        file = RunFolder(folder, recipe).evaluation_file(stage, options.get("name"))
        return dict(json.loads(file.read_text(encoding="utf-8")))
    from denserl_cli.launch.worker import ended_by_errors, work

    with ended_by_errors() if processes.world_size > 1 else nullcontext():
        result = work(stage, recipe, folder, "start", options)
    return result if is_main_process() else None


def dry_run_text(
    stage: str, recipe: Recipe, folder: Path, mode: Mode, processes: Processes | None = None
) -> str:
    """Describe what a stage would do: comments on top of the resolved recipe.

    Raises DenserlError for a model on this machine that the stages would refuse.
    """
    from denserl_cli.core.models.architecture import check_local_model

    processes = processes or Processes()
    check_local_model(recipe)
    command = shlex.join(["denserl", *(word for word in sys.argv[1:] if word != "--dry-run")])
    lines = [
        f"stage: {stage} ({mode})",
        f"run folder: {folder.absolute()}",
        *plan_lines(stage, recipe, processes.world_size),
        *chat_lines(recipe),
        f"command: {command}",
    ]
    if processes.hostfile:
        for host in read_hosts(processes.hostfile):
            lines.append(f"which starts: {shlex.join(host_command(host, 'run'))}")
    elif processes.world_size > 1 and not processes.started:
        words = worker_words(stage, Path("RESOLVED.yaml"), folder, mode)
        lines.append(f"which starts: {shlex.join(processes.torchrun(words))}")
    comments = "".join(f"# {line}\n" for line in lines)
    return comments + recipe_to_yaml(recipe).rstrip()
