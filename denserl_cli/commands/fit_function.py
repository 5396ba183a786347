"""`denserl fit-function`."""

from __future__ import annotations

from denserl_cli.commands.common import (
    DryRunOption,
    ModelOption,
    OutOption,
    PreferencesOption,
    RecipeOption,
    ResumeOption,
    SetOption,
    read_mode,
    read_recipe,
)

EXAMPLE = "Example: denserl fit-function --recipe sandbox-segment"


def fit_function(
    recipe: RecipeOption,
    overrides: SetOption = None,
    out: OutOption = None,
    data: PreferencesOption = None,
    model: ModelOption = None,
    resume: ResumeOption = None,
    dry_run: DryRunOption = False,
) -> None:
    """Fit the normaliser functions of a reward model."""
    from denserl_cli.launch import launch

    loaded = read_recipe("fit-function", recipe, overrides, data=data, model=model)
    launch("fit-function", loaded, out=out, mode=read_mode(resume), dry_run=dry_run)
