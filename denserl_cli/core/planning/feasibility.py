"""Whether a recipe fits: every ZeRO setting of a stage, the first that fits, and what would help.

Everything follows from the recipe and the model's shape (`model_shape.py`); no weights are read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from denserl_cli.core.planning.memory_terms import Setting
from denserl_cli.core.planning.model_shape import ModelShape
from denserl_cli.core.planning.stage_memory import Plan, plan
from denserl_cli.core.planning.workload import why_not_shared
from denserl_cli.core.recipe.fields import value_of, with_values
from denserl_cli.core.recipe.schema import EngineConfig, LoraConfig, Recipe
from denserl_cli.core.recipe.stages import STAGES, TRAIN_PPO, StageName

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

FIELDS = {"offload_optimizer": "offload_optimizer", "offload_parameters": "offload_param"}
"""Fields of the engine, and DeepSpeed's names in `zero_optimization`."""


def recipe_setting(recipe: Recipe, stage: StageName, gpus: int) -> Setting:
    """The setting that the recipe itself asks for."""
    engine = _engine(recipe, stage)
    return _setting(recipe, stage, gpus, _resolved(engine, gpus))


def settings(recipe: Recipe, stage: StageName, gpus: int) -> list[Setting]:
    """All settings, the cheapest in time first; plain torch, in one process, leads.

    Where the recipe's own DeepSpeed settings say what is offloaded, those that agree with them.
    """
    fixed = _fixed(_engine(recipe, stage))
    return [
        _setting(recipe, stage, gpus, (zero, optimizer, parameters))
        for zero, optimizer, parameters in CANDIDATES
        if not zero
        or (
            fixed.get("offload_optimizer", optimizer) == optimizer
            and (zero < 3 or fixed.get("offload_parameters", parameters) == parameters)
        )
    ]


def first_fit(
    recipe: Recipe, shape: ModelShape, stage: StageName, gpus: int, budget: float
) -> Plan | None:
    """The recipe's own setting if it fits in `budget` bytes, else the cheapest that does."""
    own = recipe_setting(recipe, stage, gpus)
    for setting in (own, *_usable(recipe, stage, gpus)):
        found = plan(recipe, shape, stage, setting)
        if found.peak <= budget:
            return found
    return None


def smallest(recipe: Recipe, shape: ModelShape, stage: StageName, gpus: int) -> Plan:
    """The setting that needs least on a GPU."""
    plans = (plan(recipe, shape, stage, setting) for setting in _usable(recipe, stage, gpus))
    return min(plans, key=lambda found: found.peak)


def overrides_for(recipe: Recipe, stage: StageName, setting: Setting) -> list[str]:
    """The `KEY=VALUE` overrides that make the recipe use a setting; empty when it does already."""
    engine, block = _engine(recipe, stage), STAGES[stage].block
    wanted: dict[str, Any] = {"offload_optimizer": setting.offload_optimizer}
    wanted["offload_parameters"] = setting.offload_parameters
    wanted = {key: value for key, value in wanted.items() if key not in _fixed(engine)}
    if setting.zero_stage:
        wanted["zero_stage"] = setting.zero_stage
    asked = replace(engine, **wanted)
    if (_resolved(asked, setting.gpus)[0] == 0) != (setting.zero_stage == 0):
        wanted["kind"] = "deepspeed" if setting.zero_stage else "torch"
    changed = {key: value for key, value in wanted.items() if getattr(engine, key) != value}
    return [f"{block}.engine.{key}={str(value).lower()}" for key, value in changed.items()]


class Remedy(NamedTuple):
    """Overrides beside the engine's that make a stage fit, and the plan that does."""

    overrides: tuple[str, ...]
    plan: Plan


def remedies(
    recipe: Recipe, shape: ModelShape, stage: StageName, gpus: int, budget: float
) -> list[Remedy]:
    """What makes a stage fit that does not: each change alone, else all that go together."""
    found = []
    changes = list(_changes(recipe, stage))
    for overrides, changed in (*_with_frozen_offloaded(recipe, stage), *changes):
        fits = first_fit(changed, shape, stage, gpus, budget)
        if fits is not None:
            found.append(Remedy(overrides, fits))
    if found or not changes:
        return found
    overrides, together = (), recipe
    for more, _ in changes:
        overrides = (*overrides, *more)
        together = dict(_changes(together, stage))[more]
    fits = first_fit(together, shape, stage, gpus, budget)
    return [] if fits is None else [Remedy(overrides, fits)]


def enough_gpus(
    recipe: Recipe, shape: ModelShape, stage: StageName, gpus: int, budget: float
) -> int | None:
    """The first doubling of the GPUs, up to 1024, on which the stage fits and shares its batch."""
    while (gpus := 2 * gpus) <= 1024 and not why_not_shared(stage, recipe, gpus):
        if first_fit(recipe, shape, stage, gpus, budget) is not None:
            return gpus
    return None


class Assessment(NamedTuple):
    """Whether and how a stage fits.

    Attributes:
        stage: Its name.
        budget: Bytes of one GPU.
        plans: What it needs under every setting.
        own: The recipe's own setting.
        best: The first plan that fits; None where none does.
        smallest: The plan that needs least on a GPU.
        remedies: What would make it fit; empty where it does.
        enough_gpus: GPUs on which it would fit; None where it does, or where none are known.
    """

    stage: StageName
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


def assess(
    recipe: Recipe, shape: ModelShape, stage: StageName, gpus: int, budget: float
) -> Assessment:
    """Whether and how a stage fits in `budget` bytes on each of so many GPUs."""
    best = first_fit(recipe, shape, stage, gpus, budget)
    lacks = best is None
    return Assessment(
        stage=stage,
        budget=budget,
        plans=[plan(recipe, shape, stage, each) for each in settings(recipe, stage, gpus)],
        own=recipe_setting(recipe, stage, gpus),
        best=best,
        smallest=smallest(recipe, shape, stage, gpus),
        remedies=remedies(recipe, shape, stage, gpus, budget) if lacks else [],
        enough_gpus=enough_gpus(recipe, shape, stage, gpus, budget) if lacks else None,
    )


def _usable(recipe: Recipe, stage: StageName, gpus: int) -> list[Setting]:
    """The settings of so many GPUs: plain torch is one process."""
    return [one for one in settings(recipe, stage, gpus) if one.zero_stage or gpus == 1]


Change = tuple[tuple[str, ...], Recipe]
"""Overrides and the recipe that they make."""


def _with_frozen_offloaded(recipe: Recipe, stage: StageName) -> Iterator[Change]:
    """Reference and reward model on the CPU but while they score; LoRA cannot spare them."""
    engine = recipe.ppo.engine
    if stage == TRAIN_PPO and recipe.lora is None and not engine.offload_frozen:
        offloaded = replace(recipe.ppo, engine=replace(engine, offload_frozen=True))
        yield ("ppo.engine.offload_frozen=true",), replace(recipe, ppo=offloaded)


def _changes(recipe: Recipe, stage: StageName) -> Iterator[Change]:
    """Micro-batches of 1, half the lengths, LoRA: with the overrides that ask for each."""
    row = STAGES[stage]
    few = {"ppo.rollout.rows": 1} if stage == TRAIN_PPO else {}
    yield _changed(recipe, dict.fromkeys(row.micro_batches, 1) | few)
    yield _changed(recipe, {field: value_of(recipe, field) // 2 for field in row.lengths})
    if row.trains and recipe.lora is None:
        lora = LoraConfig()
        yield (f"lora.rank={lora.rank}",), replace(recipe, lora=lora)


def _changed(recipe: Recipe, values: dict[str, int]) -> Change:
    overrides = tuple(f"{field}={value}" for field, value in values.items())
    return overrides, with_values(recipe, values)


def _engine(recipe: Recipe, stage: StageName) -> EngineConfig:
    engine: EngineConfig = value_of(recipe, f"{STAGES[stage].block}.engine")
    return engine


def _resolved(engine: EngineConfig, gpus: int) -> tuple[int, bool, bool]:
    """ZeRO stage (0: plain torch) and offloading of what a recipe asks for."""
    offloads = engine.offload_optimizer or engine.offload_parameters
    plain = engine.kind == "torch" or (engine.kind == "auto" and gpus == 1 and not offloads)
    if plain:
        return 0, False, False
    fixed = _fixed(engine)
    parameters = fixed.get("offload_parameters", engine.offload_parameters)
    optimizer = fixed.get("offload_optimizer", engine.offload_optimizer)
    return engine.zero_stage, optimizer, parameters and engine.zero_stage == 3


def _fixed(engine: EngineConfig) -> dict[str, bool]:
    """Fields that the recipe's own DeepSpeed settings overrule, and what they say of them."""
    zero = engine.deepspeed.get("zero_optimization")
    own = zero if isinstance(zero, dict) else {}
    found = {}
    for field, name in FIELDS.items():
        asked = own.get(name, {})
        if not isinstance(asked, dict) or "device" in asked:  # without, the field's stays
            found[field] = isinstance(asked, dict) and asked["device"] not in (None, "none")
    return found


def _setting(
    recipe: Recipe, stage: StageName, gpus: int, candidate: tuple[int, bool, bool]
) -> Setting:
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
        bucket=_deepspeed_size(engine, "reduce_bucket_size", 5e8),
        live=_deepspeed_size(engine, "stage3_max_live_parameters", 1e9),
        prefetch=_deepspeed_size(engine, "stage3_prefetch_bucket_size", 5e7),
    )


def _deepspeed_size(engine: EngineConfig, key: str, default: float) -> int:
    """A size from the recipe's own DeepSpeed settings; DeepSpeed's default where it has none."""
    zero = engine.deepspeed.get("zero_optimization")
    value = zero.get(key) if isinstance(zero, dict) else None
    return int(value if isinstance(value, int | float) else default)
