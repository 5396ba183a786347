"""What a stage would do, from its recipe alone: batches, steps, what is loaded.

Sizes of hub data are those that the recipe records; nothing is downloaded, and torch is not
imported.
"""

from __future__ import annotations

from typing import cast

from denserl_cli.core.planning.feasibility import recipe_setting
from denserl_cli.core.planning.workload import Steps, Workload, why_not_shared, workload
from denserl_cli.core.recipe import Recipe
from denserl_cli.core.recipe.schema import RewardSource
from denserl_cli.core.recipe.stages import FIT_FUNCTION, STAGES, TRAIN_PPO, TRAIN_RM, StageName
from denserl_cli.core.sampling.limits import MOST_ROWS
from denserl_cli.core.system.hub import has_tokenizer

UNKNOWN = "known when the data is read"


def plan_lines(stage: str, recipe: Recipe, processes: int = 1) -> list[str]:
    """Describe a stage in so many processes, one fact a line.

    Raises:
        DenserlError: The processes cannot share a batch, or the known rows do not make one.
    """
    work = workload(stage, recipe, processes)
    lines = {TRAIN_RM: _reward_model, FIT_FUNCTION: _fit, TRAIN_PPO: _ppo}[stage](recipe, work)
    return [_model(recipe), *lines, *_published_batches(stage, recipe, processes)]


def chat_lines(recipe: Recipe) -> list[str]:
    """How conversations are written, where the tokenizer is on this machine.

    Raises DenserlError for a tokenizer that cannot write them.
    """
    model = recipe.model
    path = model.tokenizer or model.path
    if not path or not has_tokenizer(path, model.revision if path == model.path else None):
        return []
    from denserl_cli.core.chat.loading import chat_of, load_tokenizer

    return [f"chat format: {chat_of(recipe, load_tokenizer(model))}"]


def _model(recipe: Recipe) -> str:
    recorded = recipe.recorded
    name = recipe.model.path or "the sandbox's"
    if recorded is None or recorded.parameters is None:
        return f"model: {name}"
    return f"model: {name}, {recorded.parameters / 1e9:.2f}B parameters (recorded)"


def _reward_model(recipe: Recipe, work: Workload) -> list[str]:
    settings, rows = recipe.reward_model, work.rows
    batch = _batch("pairs per step", work)
    if rows is None or work.steps is None:
        return [f"pairs: {UNKNOWN}", batch, f"steps: {UNKNOWN}"]
    how = f"{rows.train:,} pairs × {settings.epochs:g} epochs / {work.batch}"
    return [
        f"pairs: {rows}, about {rows.held_out:,} of them held out for evaluation",
        batch,
        f"steps: {work.steps.total:,} = {how}, if every row is usable",
    ]


def _fit(recipe: Recipe, work: Workload) -> list[str]:
    settings, rows = recipe.normalizer, work.rows
    used = settings.pairs if rows is None else min(settings.pairs, rows.total)
    segmented = recipe.segmentation.by_entropy
    models = "the reward model and of the reference" if segmented else "the reward model"
    known = "the data's size is known when it is read" if rows is None else f"of {rows}"
    assert work.steps is not None  # at most so many, whatever the data
    each = "" if work.processes == 1 else " in each process"
    return [
        f"pairs: {used:,} at most, {known}",
        _batch("pairs per forward pass", work),
        f"forward passes: about {work.steps.total:,}{each}, of {models}",
        _scored_by(recipe),
    ]


def _ppo(recipe: Recipe, work: Workload) -> list[str]:
    ppo, rows = recipe.ppo, work.rows
    responses = ppo.rollout.batch_size * ppo.rollout.samples_per_prompt
    sampled = f"{ppo.rollout.batch_size} prompts × {ppo.rollout.samples_per_prompt} samples"
    each = responses // work.batch
    prompts = f"prompts: {UNKNOWN}"
    if rows is not None:
        prompts = f"prompts: {rows}, about {rows.held_out:,} of them held out for evaluation"
    return [
        prompts,
        f"responses per iteration: {sampled} = {responses}, {_rows(recipe)}, "
        f"scored up to {ppo.rollout.micro_batch_size} at a time",
        _batch("responses per step", work),
        f"steps per iteration: {ppo.epochs} epochs × {each} = {ppo.epochs * each}",
        *_iterations(recipe, work, work.steps),
        *_rewarded_by(recipe),
    ]


def _rows(recipe: Recipe) -> str:
    """How many responses are sampled side by side."""
    rollout, rows = recipe.ppo.rollout, recipe.ppo.rollout.rows
    if rollout.server:
        return f"sampled by the vLLM server at {rollout.server}"
    if rollout.engine == "vllm":
        share = f"{rollout.memory_share:.0%} of a GPU's memory while it samples"
        return f"sampled by vLLM, which takes {share}, not counted by the plan"
    count = f"{rows} side by side" if rows else f"up to {MOST_ROWS} side by side as memory allows"
    return f"{count} on a rank"


def _iterations(recipe: Recipe, work: Workload, steps: Steps | None) -> list[str]:
    if steps is None:
        return [f"iterations: {UNKNOWN}"]
    ppo, how = recipe.ppo, "ppo.iterations"
    if ppo.iterations is None and work.rows is not None:
        passes = f"{work.rows.train:,} prompts × {ppo.passes:g} passes"
        how = f"{passes} / {ppo.rollout.batch_size}, if every row is usable"
    return [
        f"iterations: {steps.batches:,} = {how}",
        f"optimizer steps: {steps.batches:,} × {steps.per_batch} = {steps.total:,}",
    ]


def _scored_by(recipe: Recipe) -> str:
    """Which reward model the stages after train-rm score with (see `core.scoring.resolve`)."""
    own, published = "reward model: the run's own", recipe.published
    return f"{own} if there is one, else {published.reward_model}" if published else own


def _rewarded_by(recipe: Recipe) -> list[str]:
    """What train-ppo maximises, and what each source costs beside the reward model's one pass."""
    ppo, lines = recipe.ppo, ["reward model: none, no source of rewards reads one"]
    if ppo.uses_reward_model:
        lines = [_scored_by(recipe)]
        if recipe.published is not None and recipe.published.normalizer is not None:
            lines[0] += " with its published normaliser"
    seen: set[str] = set()
    if ppo.rewards == (RewardSource("values"),):
        return lines
    for one in ppo.rewards:
        costs = [] if one.key in seen or not one.key else [f"one more model, {one.key}: 1 pass"]
        if one.source == "shapley":
            costs.append(_shapley_passes(one.permutations or 0))
        seen.add(one.key)
        cost = f" ({'; '.join(costs)})" if costs else ""
        lines.append(f"reward: {one.source} × {one.weight:g}{cost}")
    return lines


def _shapley_passes(permutations: int) -> str:
    """How many parts of a response of K segments the source `shapley` scores."""
    return (
        "reward-model passes a response of K segments: 2^K up to 6, "
        f"{permutations} × (K − 1) + 2 above"
    )


def _batch(what: str, work: Workload) -> str:
    """Micro-batch × accumulation × processes = global batch."""
    parts = f"micro {work.micro_batch} × accumulation {work.accumulation} × ranks {work.processes}"
    return f"{what}: {parts} = global {work.batch}"


def _published_batches(stage: str, recipe: Recipe, processes: int) -> list[str]:
    """The same batch on as many GPUs as the published training had."""
    gpus = recipe.recorded and recipe.recorded.gpus
    if not gpus or gpus == processes or not STAGES[stage].trains:
        return []
    what, refusal = f"on {gpus} GPUs, as published", why_not_shared(stage, recipe, gpus)
    shared = refusal is None
    line = _batch(what, workload(stage, recipe, gpus)) if shared else f"{what}: {refusal}"
    engine = recipe_setting(recipe, cast(StageName, stage), gpus)
    offload = ", Adam on the CPU" if engine.offload_optimizer else ""
    return [f"{line}; ZeRO-{engine.zero_stage}{offload}"]
