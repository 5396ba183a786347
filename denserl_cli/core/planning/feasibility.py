"""Whether a recipe fits: every ZeRO setting of a stage, the first that fits, and what would help.

Everything follows from the recipe and the model's shape (`core/shapes.py`); no weights are read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from denserl_cli.core.planning.memory_terms import Setting
from denserl_cli.core.planning.model_shape import ModelShape
from denserl_cli.core.planning.stage_memory import Plan, Stage, plan
from denserl_cli.core.recipe.schema import EngineConfig, LoraConfig, Recipe

CANDIDATES = (
    (0, False, False),
    (1, False, False),
    (2, False, False),
    (3, False, False),
    (1, True, False),
    (2, True, False),
    (3, True, False),
    (3, True, True),
)
"""ZeRO stage, offload of optimizer and of parameters: what costs least time first."""


def engine_block(stage: Stage) -> str:
    """The recipe block whose engine a stage uses; fit-function follows train-rm."""
    return "ppo" if stage == "train-ppo" else "reward_model"


def own_setting(recipe: Recipe, stage: Stage, gpus: int) -> Setting:
    """The setting that the recipe itself asks for."""
    engine = _engine(recipe, stage)
    return _setting(recipe, stage, gpus, _resolved(engine, gpus))


def settings(recipe: Recipe, stage: Stage, gpus: int) -> list[Setting]:
    """All settings, the cheapest in time first; plain torch, in one process, leads."""
    return [_setting(recipe, stage, gpus, candidate) for candidate in CANDIDATES]


def first_fit(
    recipe: Recipe, shape: ModelShape, stage: Stage, gpus: int, budget: float
) -> Plan | None:
    """The recipe's own setting if it fits in `budget` bytes, else the cheapest that does."""
    own = own_setting(recipe, stage, gpus)
    usable = [s for s in settings(recipe, stage, gpus) if s.zero_stage or gpus == 1]
    for setting in (own, *usable):
        found = plan(recipe, shape, stage, setting)
        if found.peak <= budget:
            return found
    return None


def smallest(recipe: Recipe, shape: ModelShape, stage: Stage, gpus: int) -> Plan:
    """The setting that needs least on a GPU."""
    usable = [s for s in settings(recipe, stage, gpus) if s.zero_stage or gpus == 1]
    return min((plan(recipe, shape, stage, s) for s in usable), key=lambda found: found.peak)


def chosen_by(recipe: Recipe, stage: Stage, setting: Setting) -> list[str]:
    """The `KEY=VALUE` words that make the recipe use a setting; empty when it does already."""
    engine, block = _engine(recipe, stage), engine_block(stage)
    wanted: dict[str, Any] = {"offload_optimizer": setting.offload_optimizer}
    wanted["offload_parameters"] = setting.offload_parameters
    if setting.zero_stage:
        wanted["zero_stage"] = setting.zero_stage
    asked = replace(engine, **wanted)
    if (_resolved(asked, setting.gpus)[0] == 0) != (setting.zero_stage == 0):
        wanted["kind"] = "deepspeed" if setting.zero_stage else "torch"
    changed = {key: value for key, value in wanted.items() if getattr(engine, key) != value}
    return [f"{block}.engine.{key}={str(value).lower()}" for key, value in changed.items()]


class Remedy(NamedTuple):
    """Settings beside the engine's that make a stage fit, and the plan that does."""

    words: tuple[str, ...]
    plan: Plan


def remedies(
    recipe: Recipe, shape: ModelShape, stage: Stage, gpus: int, budget: float
) -> list[Remedy]:
    """What makes a stage fit that does not: each change alone, else all that go together."""
    found = []
    changes = list(_changes(recipe, stage))
    for words, changed in (*_without_frozen(recipe, stage), *changes):
        fits = first_fit(changed, shape, stage, gpus, budget)
        if fits is not None:
            found.append(Remedy(words, fits))
    if found or not changes:
        return found
    words, together = (), recipe
    for more, _ in changes:
        words = (*words, *more)
        together = dict(_changes(together, stage))[more]
    fits = first_fit(together, shape, stage, gpus, budget)
    return [] if fits is None else [Remedy(words, fits)]


def enough_gpus(
    recipe: Recipe, shape: ModelShape, stage: Stage, gpus: int, budget: float
) -> int | None:
    """The first doubling of the GPUs, up to 1024, on which the stage fits."""
    while (gpus := 2 * gpus) <= 1024:
        if first_fit(recipe, shape, stage, gpus, budget) is not None:
            return gpus
    return None


class Outlook(NamedTuple):
    """All settings of a stage. own: the recipe's. best: the first that fits.

    Where none fits: the smallest, the remedies, and how many GPUs would do.
    """

    stage: Stage
    budget: float
    plans: list[Plan]
    own: Setting
    best: Plan | None
    smallest: Plan
    remedies: list[Remedy]
    enough_gpus: int | None

    @property
    def shown(self) -> Plan:
        """The plan to look at closely: what fits, else what is nearest to it."""
        return self.best or self.smallest


def outlook(recipe: Recipe, shape: ModelShape, stage: Stage, gpus: int, budget: float) -> Outlook:
    """Whether and how a stage fits in `budget` bytes on each of so many GPUs."""
    best = first_fit(recipe, shape, stage, gpus, budget)
    lacks = best is None
    return Outlook(
        stage=stage,
        budget=budget,
        plans=[plan(recipe, shape, stage, each) for each in settings(recipe, stage, gpus)],
        own=own_setting(recipe, stage, gpus),
        best=best,
        smallest=smallest(recipe, shape, stage, gpus),
        remedies=remedies(recipe, shape, stage, gpus, budget) if lacks else [],
        enough_gpus=enough_gpus(recipe, shape, stage, gpus, budget) if lacks else None,
    )


def _without_frozen(recipe: Recipe, stage: Stage) -> Iterator[tuple[tuple[str, ...], Recipe]]:
    """Reference and reward model away while they have nothing to do; LoRA cannot spare them."""
    engine = recipe.ppo.engine
    if stage == "train-ppo" and recipe.lora is None and not engine.offload_frozen:
        resting = replace(recipe.ppo, engine=replace(engine, offload_frozen=True))
        yield ("ppo.engine.offload_frozen=true",), replace(recipe, ppo=resting)


def _changes(recipe: Recipe, stage: Stage) -> Iterator[tuple[tuple[str, ...], Recipe]]:
    """Smaller micro-batches, shorter texts, LoRA: with the words that ask for each."""
    rm, data, ppo, normalizer = recipe.reward_model, recipe.data, recipe.ppo, recipe.normalizer
    if stage == "train-rm":
        yield (
            ("reward_model.micro_batch_size=1",),
            replace(recipe, reward_model=replace(rm, micro_batch_size=1)),
        )
    elif stage == "fit-function":
        yield (
            ("normalizer.batch_size=1",),
            replace(recipe, normalizer=replace(normalizer, batch_size=1)),
        )
    else:
        yield (
            ("ppo.micro_batch_size=1", "ppo.rollout_micro_batch_size=1"),
            replace(recipe, ppo=replace(ppo, micro_batch_size=1, rollout_micro_batch_size=1)),
        )
    if stage == "train-ppo":
        prompt, new = ppo.max_prompt_length // 2, ppo.max_new_tokens // 2
        shorter = replace(ppo, max_prompt_length=prompt, max_new_tokens=new)
        words = (f"ppo.max_prompt_length={prompt}", f"ppo.max_new_tokens={new}")
        yield words, replace(recipe, ppo=shorter)
    else:
        length, prompt = data.max_length // 2, data.max_prompt_length // 2
        cut = replace(data, max_length=length, max_prompt_length=prompt)
        words = (f"data.max_length={length}", f"data.max_prompt_length={prompt}")
        yield words, replace(recipe, data=cut)
    if stage != "fit-function" and recipe.lora is None:
        lora = LoraConfig()
        yield (f"lora.rank={lora.rank}",), replace(recipe, lora=lora)


def _engine(recipe: Recipe, stage: Stage) -> EngineConfig:
    return recipe.ppo.engine if stage == "train-ppo" else recipe.reward_model.engine


def _resolved(engine: EngineConfig, gpus: int) -> tuple[int, bool, bool]:
    """ZeRO stage (0: plain torch) and offloading of what a recipe asks for."""
    offloads = engine.offload_optimizer or engine.offload_parameters
    plain = engine.kind == "torch" or (engine.kind == "auto" and gpus == 1 and not offloads)
    if plain:
        return 0, False, False
    parameters = engine.offload_parameters and engine.zero_stage == 3
    return engine.zero_stage, engine.offload_optimizer, parameters


def _setting(recipe: Recipe, stage: Stage, gpus: int, candidate: tuple[int, bool, bool]) -> Setting:
    engine, (zero, optimizer, parameters) = _engine(recipe, stage), candidate
    shard = zero == 3 if engine.shard_frozen is None else engine.shard_frozen
    compute = 4 if recipe.model.dtype == "float32" else 2  # auto: bfloat16 on a GPU
    return Setting(
        gpus=gpus,
        zero_stage=zero,
        offload_optimizer=optimizer,
        offload_parameters=parameters,
        shard_frozen=shard,
        offload_frozen=engine.offload_frozen,
        compute=compute,
        gradient=4 if engine.gradient_dtype == "float32" else 2,
        checkpointing=recipe.model.gradient_checkpointing,
        eager=recipe.model.attention == "eager",
        bucket=_own(engine, "reduce_bucket_size", 5e8),
        live=_own(engine, "stage3_max_live_parameters", 1e9),
        prefetch=_own(engine, "stage3_prefetch_bucket_size", 5e7),
    )


def _own(engine: EngineConfig, key: str, default: float) -> int:
    """A size from the recipe's own DeepSpeed settings; DeepSpeed's default where it has none."""
    zero = engine.deepspeed.get("zero_optimization")
    value = zero.get(key) if isinstance(zero, dict) else None
    return int(value if isinstance(value, int | float) else default)
