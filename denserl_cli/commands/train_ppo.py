"""`denserl train-ppo`."""

from __future__ import annotations

from denserl_cli.commands.common import (
    DryRunOption,
    HostfileOption,
    ModelOption,
    NodeRankOption,
    NodesOption,
    OutOption,
    ProcessesOption,
    PromptsOption,
    RecipeOption,
    RendezvousOption,
    ResumeOption,
    SetOption,
    read_mode,
    read_recipe,
)

EXAMPLE = "Example: denserl train-ppo --recipe sandbox-segment"


def train_ppo(
    recipe: RecipeOption,
    overrides: SetOption = None,
    out: OutOption = None,
    data: PromptsOption = None,
    model: ModelOption = None,
    resume: ResumeOption = None,
    dry_run: DryRunOption = False,
    processes: ProcessesOption = None,
    nodes: NodesOption = 1,
    node_rank: NodeRankOption = None,
    rendezvous: RendezvousOption = None,
    hostfile: HostfileOption = None,
) -> None:
    """Train a recipe's policy by PPO with dense rewards."""
    from denserl_cli.launch.launcher import launch
    from denserl_cli.launch.processes import read_processes

    loaded = read_recipe("train-ppo", recipe, overrides, data=data, model=model)
    launch(
        "train-ppo",
        loaded,
        out=out,
        mode=read_mode(resume),
        dry_run=dry_run,
        processes=read_processes(processes, nodes, node_rank, rendezvous, hostfile),
    )
