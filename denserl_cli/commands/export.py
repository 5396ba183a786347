"""`denserl export`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from denserl_cli.commands.common import (
    DryRunOption,
    OutOption,
    RecipeOption,
    SetOption,
)

EXAMPLE = "Example: denserl export --recipe sandbox-segment --part policy --to my-policy"


class Part(StrEnum):
    """What can be exported."""

    POLICY = "policy"
    POLICY_BEST = "policy-best"
    REWARD_MODEL = "reward-model"


def export(
    recipe: RecipeOption,
    overrides: SetOption = None,
    out: OutOption = None,
    part: Annotated[Part, typer.Option("--part", help="What to export.")] = Part.POLICY,
    to: Annotated[
        Path | None,
        typer.Option("--to", metavar="DIR", help="Target; RUN/export/PART without it."),
    ] = None,
    as_classifier: Annotated[
        bool,
        typer.Option(
            "--as-classifier",
            help="Write a bandit reward model so that the logit of a conversation's last token, "
            "which pipelines, vLLM and RewardBench read, is its score.",
        ),
    ] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Replace an earlier export.")] = False,
    dry_run: DryRunOption = False,
) -> None:
    """Write the policy or the reward model as a plain Hugging Face folder with a model card."""
    from denserl_cli.core.recipe import load_recipe
    from denserl_cli.core.runs.folder import RunFolder

    loaded = load_recipe(recipe, overrides or ())
    folder = out or Path("runs") / loaded.name
    target = to or folder / "export" / part.value
    if dry_run:
        typer.echo(f"would write the {part.value} of {folder} to {target}")
        return
    from denserl_cli.core.stages.export import export as write
    from denserl_cli.core.stages.run import quiet_libraries

    quiet_libraries()
    write(
        part.value,
        loaded,
        RunFolder(folder, loaded),
        target,
        replace=fresh,
        as_classifier=as_classifier,
    )
    typer.echo(f"exported the {part.value} to {target}")
