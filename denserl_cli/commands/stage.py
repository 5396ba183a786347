"""The commands that train: one shape, a stage each."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from denserl_cli.commands.common import (
    DryRunOption,
    HostfileOption,
    ModelOption,
    NodeRankOption,
    NodesOption,
    OutOption,
    PreferencesOption,
    ProcessesOption,
    RecipeOption,
    RendezvousOption,
    ResumeOption,
    SetOption,
    read_mode,
    read_recipe,
)

if TYPE_CHECKING:
    from denserl_cli.core.recipe.stages import StageName


def stage_command(
    stage: StageName, summary: str, data_option: Any = PreferencesOption
) -> Callable[..., None]:
    """Return the function that Typer makes the command of a stage from.

    Args:
        stage: `train-rm`, `fit-function` or `train-ppo`.
        summary: Help of the command.
        data_option: What its `--data` names.
    """

    def run(
        recipe: RecipeOption,
        overrides: SetOption = None,
        out: OutOption = None,
        data: PreferencesOption = None,
        model: ModelOption = None,
        resume: ResumeOption = None,
        dry_run: DryRunOption = False,
        processes: ProcessesOption = None,
        nodes: NodesOption = 1,
        node_rank: NodeRankOption = None,
        rendezvous: RendezvousOption = None,
        hostfile: HostfileOption = None,
    ) -> None:
        from denserl_cli.launch.launcher import launch
        from denserl_cli.launch.processes import read_processes

        launch(
            stage,
            read_recipe(stage, recipe, overrides, data=data, model=model),
            out=out,
            mode=read_mode(resume),
            dry_run=dry_run,
            processes=read_processes(processes, nodes, node_rank, rendezvous, hostfile),
        )

    run.__doc__ = summary
    run.__annotations__["data"] = data_option
    return run
