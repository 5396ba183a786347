"""`denserl train-rm`."""

from __future__ import annotations

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

EXAMPLE = "Example: denserl train-rm --recipe sandbox-segment"


def train_rm(
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
    """Train a recipe's reward model on preference pairs."""
    from denserl_cli.launch.launcher import launch
    from denserl_cli.launch.processes import read_processes

    loaded = read_recipe("train-rm", recipe, overrides, data=data, model=model)
    launch(
        "train-rm",
        loaded,
        out=out,
        mode=read_mode(resume),
        dry_run=dry_run,
        processes=read_processes(processes, nodes, node_rank, rendezvous, hostfile),
    )
