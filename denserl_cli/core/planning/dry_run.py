"""What a stage would do, from its recipe alone: batches, steps, what is loaded.

Sizes of hub data are those that the recipe records; nothing is downloaded and torch stays out.
"""

from __future__ import annotations

import math

from denserl_cli.core.planning.workload import _held_out, _pairs, _prompts, _steps
from denserl_cli.core.recipe import Recipe


def plan_lines(stage: str, recipe: Recipe, ranks: int = 1) -> list[str]:
    """Describe a stage in so many processes, one fact a line.

    Raises DenserlError when the known data do not make one batch.
    """
    lines = {"train-rm": _reward_model, "fit-function": _fit, "train-ppo": _ppo}[stage](
        recipe, ranks
    )
    return [*_model(recipe), *lines, *_published_batches(stage, recipe, ranks)]


def _model(recipe: Recipe) -> list[str]:
    recorded = recipe.recorded
    name = recipe.model.path or "the sandbox's"
    if recorded is None or recorded.parameters is None:
        return [f"model: {name}"]
    return [f"model: {name}, {recorded.parameters / 1e9:.2f}B parameters (recorded)"]


def _reward_model(recipe: Recipe, ranks: int) -> list[str]:
    settings, data = recipe.reward_model, recipe.data
    batch, size = settings.batch_size, _pairs(recipe)
    lines = [batches("pairs per step", settings.micro_batch_size, batch, ranks)]
    if size is None:
        return ["pairs: known when the data is read", *lines, "steps: known when the data is read"]
    held = 0 if data.evaluation else _held_out(size, data.eval_pairs)
    train = size.rows - held
    steps = _steps(train, batch, settings.epochs, "reward_model.batch_size")
    what = f"{train:,} pairs × {settings.epochs:g} epochs / {batch}"
    return [
        f"pairs: {size}, about {held:,} of them held out for evaluation",
        *lines,
        f"steps: {steps:,} = {what}, if every row is usable",
    ]


def _fit(recipe: Recipe, ranks: int) -> list[str]:
    settings, size = recipe.normalizer, _pairs(recipe)
    used = settings.pairs if size is None else min(settings.pairs, size.rows)
    passes = math.ceil(used / settings.batch_size)
    segmented = recipe.segmentation.by_entropy
    models = "the reward model and of the reference" if segmented else "the reward model"
    known = "the data's size is known when it is read" if size is None else f"of {size}"
    return [
        f"pairs: {used:,} at most, {known}",
        batches("pairs per forward pass", settings.batch_size, settings.batch_size * ranks, ranks),
        f"forward passes: {passes:,} at most, of {models}",
        _scored_by(recipe),
    ]


def _ppo(recipe: Recipe, ranks: int) -> list[str]:
    ppo, size = recipe.ppo, _prompts(recipe)
    responses = ppo.rollout_batch_size * ppo.samples_per_prompt
    sampled = f"{ppo.rollout_batch_size} prompts × {ppo.samples_per_prompt} samples"
    steps = responses // ppo.train_batch_size
    lines = [
        f"responses per iteration: {sampled} = {responses}, "
        f"up to {ppo.rollout_micro_batch_size} at a time on a rank",
        batches("responses per step", ppo.micro_batch_size, ppo.train_batch_size, ranks),
        f"steps per iteration: {ppo.epochs} epochs × {steps} = {ppo.epochs * steps}",
    ]
    iterations, why = ppo.iterations, "ppo.iterations"
    prompts = "prompts: known when the data is read"
    if size is not None:
        held = _held_out(size, recipe.data.eval_prompts)
        train, batch = size.rows - held, ppo.rollout_batch_size
        prompts = f"prompts: {size}, about {held:,} of them held out for evaluation"
        passes = ppo.passes if iterations is None else iterations * batch / max(1, train)
        planned = _steps(train, batch, passes, "ppo.rollout_batch_size")
        if iterations is None:
            iterations = planned
            why = f"{train:,} prompts × {passes:g} passes / {batch}, if every row is usable"
    counted = _iterations(iterations, why, ppo.epochs * steps)
    return [prompts, *lines, *counted, *_rewarded_by(recipe)]


def _iterations(iterations: int | None, why: str, steps: int) -> list[str]:
    if iterations is None:
        return ["iterations: known when the data is read"]
    return [
        f"iterations: {iterations:,} = {why}",
        f"optimizer steps: {iterations:,} × {steps} = {iterations * steps:,}",
    ]


def _scored_by(recipe: Recipe) -> str:
    """Which reward model the stages after train-rm score with (see `core.adopting`)."""
    own, published = "reward model: the run's own", recipe.published
    return f"{own} if there is one, else {published.reward_model}" if published else own


def _rewarded_by(recipe: Recipe) -> list[str]:
    """What train-ppo maximises: a reward model, functions of the user's own, or both."""
    ppo, lines = recipe.ppo, ["reward model: none, its weight is 0"]
    if ppo.learned_weight:
        lines = [_scored_by(recipe)]
        if recipe.published is not None and recipe.published.normalizer is not None:
            lines[0] += " with its published normaliser"
        if ppo.learned_weight != 1:
            lines[0] += f", × {ppo.learned_weight:g}"
    return lines + [f"reward: {one.function} × {one.weight:g}" for one in ppo.reward]


def batches(what: str, micro: int, total: int, ranks: int) -> str:
    """Return micro × accumulation × ranks = global, or that it does not come out."""
    if total % (micro * ranks):
        return f"{what}: global {total} is not a multiple of micro {micro} × ranks {ranks}"
    accumulation = total // (micro * ranks)
    return f"{what}: micro {micro} × accumulation {accumulation} × ranks {ranks} = global {total}"


def _published_batches(stage: str, recipe: Recipe, ranks: int) -> list[str]:
    """The same batch on as many GPUs as the published training had."""
    recorded = recipe.recorded
    if recorded is None or recorded.gpus == ranks or stage == "fit-function":
        return []
    if stage == "train-rm":
        micro, total = recipe.reward_model.micro_batch_size, recipe.reward_model.batch_size
        engine = recipe.reward_model.engine
    else:
        micro, total = recipe.ppo.micro_batch_size, recipe.ppo.train_batch_size
        engine = recipe.ppo.engine
    line = batches(f"on {recorded.gpus} GPUs, as published", micro, total, recorded.gpus)
    offload = ", Adam on the CPU" if engine.offload_optimizer else ""
    return [f"{line}; ZeRO-{engine.zero_stage}{offload}"]
