"""`denserl plan`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from denserl_cli.commands.common import ModelOption, RecipeOption, SetOption
from denserl_cli.core.errors import DenserlError

if TYPE_CHECKING:
    from denserl_cli.core.planning.feasibility import Assessment
    from denserl_cli.core.planning.memory_terms import Setting
    from denserl_cli.core.planning.stage_memory import Plan
    from denserl_cli.core.planning.workload import Workload
    from denserl_cli.core.recipe import Recipe
    from denserl_cli.core.recipe.stages import StageName

EXAMPLE = "Example: denserl plan --recipe sandbox-segment --gpus 8 --gpu-memory 80"


def plan(
    recipe: RecipeOption,
    overrides: SetOption = None,
    model: ModelOption = None,
    gpus: Annotated[
        int | None,
        typer.Option("--gpus", min=1, max=100_000, help="GPUs; those the recipe records, or 1."),
    ] = None,
    gpu_memory: Annotated[
        float, typer.Option("--gpu-memory", min=1, help="Memory of one GPU, GiB.")
    ] = 80,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Estimate what each stage needs on each GPU, and the first setting that fits."""
    from denserl_cli.core.planning.feasibility import assess
    from denserl_cli.core.planning.memory_terms import GIB
    from denserl_cli.core.planning.model_shape import recipe_shape
    from denserl_cli.core.recipe import load_recipe
    from denserl_cli.core.recipe.loader import Override
    from denserl_cli.core.recipe.stages import TRAINING

    named = [] if model is None else [Override(f"--model {model}", "model.path", model)]
    loaded = load_recipe(recipe, [*named, *(overrides or ())])
    count = gpus or (loaded.recorded and loaded.recorded.gpus) or 1
    shape = recipe_shape(loaded, recorded=model is None)
    found = [assess(loaded, shape, stage, count, gpu_memory * GIB) for stage in TRAINING]
    works = {one.stage: _work(loaded, one) for one in found}
    if as_json:
        import json

        stages = {one.stage: _record(loaded, one, works[one.stage]) for one in found}
        facts = {"recipe": loaded.name, "parameters": shape.parameters, "gpus": count}
        typer.echo(json.dumps({**facts, "gpu_memory_gib": gpu_memory, "stages": stages}, indent=2))
    else:
        weights = shape.parameters
        size = f"{weights / 1e9:.3g}B" if weights >= 1e8 else f"{weights / 1e6:.3g}M"
        typer.echo(f"{loaded.name}: {size} weights, {count} x {gpu_memory:g} GiB")
        _show_settings(found)
        for one in found:
            _show_stage(loaded, one, works[one.stage])
    _refuse(works)


def _work(recipe: Recipe, found: Assessment) -> Workload | DenserlError:
    """The work of a stage, or the error with which the stage itself would end."""
    from denserl_cli.core.planning.workload import workload

    try:
        return workload(found.stage, recipe, found.shown.setting.ranks)
    except DenserlError as error:
        return error


def _refuse(works: dict[StageName, Workload | DenserlError]) -> None:
    """Raise DenserlError where a stage would refuse to run, whatever fits."""
    errors = {stage: work for stage, work in works.items() if isinstance(work, DenserlError)}
    if errors:
        raise DenserlError(
            "\n".join(f"{stage}: {error.message}" for stage, error in errors.items()),
            hint="\n".join(dict.fromkeys(error.hint for error in errors.values() if error.hint)),
        )


def _show_settings(found: list[Assessment]) -> None:
    """One table: the peak of every stage under every setting."""
    from denserl_cli.terminal.console import print_table

    rows = []
    for number, first in enumerate(found[0].plans):
        cells = [_size(one, one.plans[number]) for one in found]
        rows.append([_name(first.setting), *cells])
    columns = ["GiB on each GPU", *(one.stage for one in found)]
    print_table("", columns, rows)
    typer.echo("> does not fit; * the recipe's own setting")


def _size(found: Assessment, plan: Plan) -> str:
    mark = ">" if plan.peak > found.budget else " "
    own = "*" if _same(plan.setting, found.own) else ""
    return f"{mark}{_gib(plan.peak):7.1f} {own}"


def _show_stage(recipe: Recipe, found: Assessment, work: Workload | DenserlError) -> None:
    """A stage: its work, what to set, and where the memory goes."""
    from denserl_cli.core.planning.memory_terms import TERMS, total
    from denserl_cli.terminal.console import print_table

    plan = found.shown
    for line in [*_steps(found.stage, work), *_verdict(recipe, found, work)]:
        typer.echo(line)
    rows: list[list[object]] = [
        [term, *(round(_gib(terms.get(term, 0)), 2) for terms in plan.phases.values())]
        for term in TERMS
        if any(terms.get(term) for terms in plan.phases.values())
    ]
    rows.append(["together", *(round(_gib(total(terms)), 2) for terms in plan.phases.values())])
    print_table("", ["GiB", *plan.phases], rows)


def _steps(stage: StageName, work: Workload | DenserlError) -> list[str]:
    """The batches of a stage, its steps and tokens; or why it would not run."""
    from denserl_cli.core.recipe.stages import TRAIN_PPO

    if isinstance(work, DenserlError):
        return [f"{stage} would not run: {work.message}", f"  {work.hint}"]
    parts = f"micro {work.micro_batch} × {work.accumulation} × {work.processes} processes"
    text = f"{stage}: a step of {work.batch} {work.unit} = {parts}"
    if work.steps is None:
        return [text, "  steps: known when the data is read"]
    steps = f"  {work.steps.total:,} steps, at most {work.tokens:,} tokens with padding"
    if stage == TRAIN_PPO:
        steps += f", in {work.steps.batches:,} iterations"
    return [text, steps]


def _verdict(recipe: Recipe, found: Assessment, work: Workload | DenserlError) -> list[str]:
    """What fits and the overrides that choose it; else what is missing and what would do."""
    from denserl_cli.core.planning.feasibility import overrides_for

    plan = found.shown
    need = f"{_name(plan.setting)}: {_gib(plan.peak):.1f} of {_gib(found.budget):.1f} GiB"
    if found.best is not None:
        runs = not isinstance(work, DenserlError)
        options = _options(overrides_for(recipe, found.stage, plan.setting))
        how = options or ("as the recipe is" if runs else "")
        return [
            f"  fits with {need}" if runs else f"  its memory would fit with {need}",
            *([f"  {how}"] if how else []),
            f"  CPU memory of all processes: {_gib(plan.cpu):.0f} GiB",
        ]
    lacking = _gib(plan.peak - found.budget)
    lines = [f"  nothing fits: {need}, {lacking:.1f} too many"]
    for remedy in found.remedies:
        chosen = overrides_for(recipe, found.stage, remedy.plan.setting)
        peak = f"{_gib(remedy.plan.peak):.1f} GiB"
        lines.append(f"  would fit in {peak}: {_options([*remedy.overrides, *chosen])}")
    if found.enough_gpus:
        lines.append(f"  would fit on {found.enough_gpus} GPUs")
    return lines


def _record(recipe: Recipe, found: Assessment, work: Workload | DenserlError) -> dict[str, Any]:
    """A stage as JSON; all sizes in bytes."""
    from denserl_cli.core.planning.feasibility import overrides_for

    stage = found.stage
    return {
        "settings": [_plan(recipe, plan, found.budget) for plan in found.plans],
        "recipe": _plain(found.own),
        "chosen": None if found.best is None else _plan(recipe, found.best, found.budget),
        "remedies": [
            {
                "set": [*remedy.overrides, *overrides_for(recipe, stage, remedy.plan.setting)],
                "peak": round(remedy.plan.peak),
            }
            for remedy in found.remedies
        ],
        "enough_gpus": found.enough_gpus,
        "refused": work.message if isinstance(work, DenserlError) else None,
        "work": None if isinstance(work, DenserlError) else _batches(work),
    }


def _batches(work: Workload) -> dict[str, Any]:
    return {
        "what": work.unit,
        "batch": work.batch,
        "micro_batch": work.micro_batch,
        "ranks": work.processes,
        "rounds": work.accumulation,
        "steps": work.steps and work.steps.total,
        "tokens": work.tokens,
    }


def _plan(recipe: Recipe, plan: Plan, budget: float) -> dict[str, Any]:
    from denserl_cli.core.planning.feasibility import overrides_for

    return {
        **_plain(plan.setting),
        "peak": round(plan.peak),
        "fits": plan.peak <= budget,
        "cpu": round(plan.cpu),
        "set": overrides_for(recipe, plan.stage, plan.setting),
        "phases": {
            name: {term: round(size) for term, size in terms.items()}
            for name, terms in plan.phases.items()
        },
    }


def _plain(setting: Setting) -> dict[str, Any]:
    names = ("zero_stage", "offload_optimizer", "offload_parameters", "ranks")
    return {name: getattr(setting, name) for name in names}


def _same(one: Setting, other: Setting) -> bool:
    return _plain(one) == _plain(other)


def _name(setting: Setting) -> str:
    if not setting.zero_stage:
        return "plain torch, one GPU"
    parts = [("Adam", setting.offload_optimizer), ("weights", setting.offload_parameters)]
    offloaded = " and ".join(name for name, is_offloaded in parts if is_offloaded)
    return f"ZeRO {setting.zero_stage}" + (f", {offloaded} on the CPU" if offloaded else "")


def _options(overrides: list[str]) -> str:
    return " ".join(f"--set {override}" for override in overrides)


def _gib(size: float) -> float:
    from denserl_cli.core.planning.memory_terms import GIB

    return size / GIB
