"""`denserl plan`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from denserl_cli.commands.common import ModelOption, RecipeOption, SetOption

if TYPE_CHECKING:
    from denserl_cli.core.planning.feasibility import Outlook
    from denserl_cli.core.planning.memory_terms import Setting
    from denserl_cli.core.planning.stage_memory import Plan
    from denserl_cli.core.recipe import Recipe

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
    from denserl_cli.core.planning.feasibility import outlook
    from denserl_cli.core.planning.memory_terms import GIB
    from denserl_cli.core.planning.model_shape import recipe_shape
    from denserl_cli.core.planning.stage_memory import STAGES
    from denserl_cli.core.recipe import load_recipe
    from denserl_cli.core.recipe.loader import Override

    named = [] if model is None else [Override(f"--model {model}", "model.path", model)]
    loaded = load_recipe(recipe, [*named, *(overrides or ())])
    count = gpus or (loaded.recorded.gpus if loaded.recorded else 1)
    shape = recipe_shape(loaded, recorded=model is None)
    outlooks = [outlook(loaded, shape, stage, count, gpu_memory * GIB) for stage in STAGES]
    if as_json:
        import json

        stages = {found.stage: _record(loaded, found) for found in outlooks}
        facts = {"recipe": loaded.name, "parameters": shape.parameters, "gpus": count}
        typer.echo(json.dumps({**facts, "gpu_memory_gib": gpu_memory, "stages": stages}, indent=2))
        return
    typer.echo(
        f"{loaded.name}: {shape.parameters / 1e9:.3g}B weights, {count} x {gpu_memory:g} GiB"
    )
    _show_settings(outlooks)
    for found in outlooks:
        _show_stage(loaded, found)


def _show_settings(outlooks: list[Outlook]) -> None:
    """One table: the peak of every stage under every setting."""
    from denserl_cli.terminal.console import print_table

    rows = []
    for place, first in enumerate(outlooks[0].plans):
        cells = [_size(found, found.plans[place]) for found in outlooks]
        rows.append([_name(first.setting), *cells])
    columns = ["GiB on each GPU", *(found.stage for found in outlooks)]
    print_table("", columns, rows)
    typer.echo("> does not fit; * the recipe's own setting")


def _size(found: Outlook, plan: Plan) -> str:
    mark = ">" if plan.peak > found.budget else " "
    own = "*" if _same(plan.setting, found.own) else ""
    return f"{mark}{_gib(plan.peak):7.1f} {own}"


def _show_stage(recipe: Recipe, found: Outlook) -> None:
    """A stage: its work, what to set, and where the memory goes."""
    from denserl_cli.core.planning.memory_terms import TERMS, total
    from denserl_cli.terminal.console import print_table

    plan = found.shown
    for line in [*_work(recipe, plan), *_verdict(recipe, found)]:
        typer.echo(line)
    rows: list[list[object]] = [
        [term, *(round(_gib(terms.get(term, 0)), 2) for terms in plan.phases.values())]
        for term in TERMS
        if any(terms.get(term) for terms in plan.phases.values())
    ]
    rows.append(["together", *(round(_gib(total(terms)), 2) for terms in plan.phases.values())])
    print_table("", ["GiB", *plan.phases], rows)


def _work(recipe: Recipe, plan: Plan) -> list[str]:
    """The batches of a stage, its steps and tokens."""
    from denserl_cli.core.planning.workload import iterations, workload

    work = workload(recipe, plan.stage, plan.setting.ranks)
    batch = f"{work.batch} {work.what} = micro {work.micro_batch} × {work.rounds} × {work.ranks}"
    uneven = work.idle or work.batch % (work.micro_batch * work.ranks)
    text = f"{plan.stage}: a step of {batch} processes{', not evenly' if uneven else ''}"
    if work.steps is None or work.tokens is None:
        return [text, "  steps: known when the data is read"]
    steps = f"  {work.steps:,} steps, at most {work.tokens:,} tokens with padding"
    if plan.stage == "train-ppo":
        steps += f", in {iterations(recipe):,} iterations"
    return [text, steps]


def _verdict(recipe: Recipe, found: Outlook) -> list[str]:
    """What fits and the words that choose it; else what is missing and what would do."""
    from denserl_cli.core.planning.feasibility import chosen_by

    plan = found.shown
    need = f"{_name(plan.setting)}: {_gib(plan.peak):.1f} of {_gib(found.budget):.1f} GiB"
    if found.best is not None:
        words = chosen_by(recipe, found.stage, plan.setting)
        cpu = f"  CPU memory of all processes: {_gib(plan.cpu):.0f} GiB"
        return [f"  fits with {need}", f"  {_words(words) or 'as the recipe is'}", cpu]
    lacking = _gib(plan.peak - found.budget)
    lines = [f"  nothing fits: {need}, {lacking:.1f} too many"]
    for remedy in found.remedies:
        chosen = chosen_by(recipe, found.stage, remedy.plan.setting)
        peak = f"{_gib(remedy.plan.peak):.1f} GiB"
        lines.append(f"  would fit in {peak}: {_words([*remedy.words, *chosen])}")
    if found.enough_gpus:
        lines.append(f"  would fit on {found.enough_gpus} GPUs")
    return lines


def _record(recipe: Recipe, found: Outlook) -> dict[str, Any]:
    """A stage as JSON; all sizes in bytes."""
    from denserl_cli.core.planning.feasibility import chosen_by
    from denserl_cli.core.planning.workload import workload

    stage = found.stage
    return {
        "settings": [_plan(recipe, plan, found.budget) for plan in found.plans],
        "recipe": _plain(found.own),
        "chosen": None if found.best is None else _plan(recipe, found.best, found.budget),
        "remedies": [
            {
                "set": [*remedy.words, *chosen_by(recipe, stage, remedy.plan.setting)],
                "peak": round(remedy.plan.peak),
            }
            for remedy in found.remedies
        ],
        "enough_gpus": found.enough_gpus,
        "work": workload(recipe, stage, found.shown.setting.ranks)._asdict(),
    }


def _plan(recipe: Recipe, plan: Plan, budget: float) -> dict[str, Any]:
    from denserl_cli.core.planning.feasibility import chosen_by

    return {
        **_plain(plan.setting),
        "peak": round(plan.peak),
        "fits": plan.peak <= budget,
        "cpu": round(plan.cpu),
        "set": chosen_by(recipe, plan.stage, plan.setting),
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
    away = " and ".join(name for name, gone in parts if gone)
    return f"ZeRO {setting.zero_stage}" + (f", {away} on the CPU" if away else "")


def _words(settings: list[str]) -> str:
    return " ".join(f"--set {word}" for word in settings)


def _gib(size: float) -> float:
    from denserl_cli.core.planning.memory_terms import GIB

    return size / GIB
