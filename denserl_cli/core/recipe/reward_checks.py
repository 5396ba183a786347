"""The sources of rewards that a recipe names (`ppo.rewards`): what each needs, and what fits."""

from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches

from denserl_cli.core.recipe.functions import why_not
from denserl_cli.core.recipe.mapping_checks import Problem
from denserl_cli.core.recipe.schema import SOURCE_DEFAULTS, SOURCES, Recipe, RewardSource

_LIST = "ppo.rewards"
_KEEPS_A_SUM = ("differences", "attention", "shapley")
"""Their rewards add up to a score, which what scales a response's rewards would break."""


def reward_problems(recipe: Recipe) -> Iterator[Problem]:
    """Yield what is wrong with the sources of rewards: what is absent, or does not fit."""
    ppo, seen = recipe.ppo, set[str]()
    for place, one in enumerate(ppo.rewards):
        key = f"{_LIST}[{place}]"
        called = one.source if one.reads_reward_model else one.metric
        if not one.built_in and (problem := why_not(one.source)):
            near = get_close_matches(one.source, SOURCES, 1)
            advice = f"did you mean {near[0]}?" if near else f"built in are {', '.join(SOURCES)}"
            yield Problem(f"{key}.source", f"{problem}; {advice}")
        elif called in seen:
            advice = "metrics need names of their own; give it a `name`"
            yield Problem(f"{key}.source", f"a second reward called {one.label}; {advice}")
        seen.add(called)
        yield from _fields(key, one)
        yield from _needs(key, one, recipe)
    yield from _kept_sums(recipe)
    if not any(one.weight for one in ppo.rewards):
        yield Problem(_LIST, "nothing is rewarded; name a source with a weight, such as values")
    if ppo.critic_init == "reward_model" and not ppo.uses_reward_model:
        yield Problem("ppo.critic_init", "there is no reward model; use policy", (_LIST,))


def _fields(key: str, one: RewardSource) -> Iterator[Problem]:
    """Settings of a source that it does not read, or that make no sense."""
    for owner, settings in SOURCE_DEFAULTS.items():
        for name in settings:
            value = getattr(one, name)
            if value is not None and one.source != owner:
                yield Problem(f"{key}.{name}", f"belongs to {owner}, not to {one.source}; drop it")
            elif value is not None and not value > 0:
                yield Problem(f"{key}.{name}", f"must be positive, not {value}")
    if one.revision is not None and one.model is None:
        yield Problem(f"{key}.revision", "is that of a `model`, which is missing; name it")
    if one.name is not None and not one.name.isidentifier():
        yield Problem(f"{key}.name", f"{one.name!r} cannot be part of a metric's name; use a word")


def _needs(key: str, one: RewardSource, recipe: Recipe) -> Iterator[Problem]:
    """What a built-in source needs of the rest of the recipe."""
    ppo, source = recipe.ppo, f"{key}.source"
    if one.source == "log_ratio":
        if one.model is None:
            advice = "log_ratio compares a second policy with the reference; name its folder"
            yield Problem(f"{key}.model", f"missing; {advice}", (source,))
        elif (one.model, one.revision) == (recipe.model.path, recipe.model.revision):
            advice = "is the reference itself, so every log-ratio is 0; name a trained policy"
            yield Problem(f"{key}.model", advice, ("model.path",))
        if recipe.lora is not None:
            advice = "degenerates where adapters train few directions; set lora to null"
            yield Problem(source, f"log_ratio {advice}, or leave it out", ("lora",))
    if one.source == "shapley" and recipe.segmentation.granularity == "bandit":
        advice = "shares a score among segments, bandit has one; use segment, or the source score"
        yield Problem(source, f"shapley {advice}", ("segmentation.granularity",))
    if one.source == "differences" and ppo.gamma != 1:
        advice = "differences of values add up to a score with 1 alone; set it to 1"
        yield Problem("ppo.gamma", f"{advice}, or leave the source out", (source,))


def _kept_sums(recipe: Recipe) -> Iterator[Problem]:
    """Settings that scale a response's rewards, beside sources that promise their sum."""
    ppo, named = recipe.ppo, [one.source for one in recipe.ppo.rewards]
    kept = [source for source in _KEEPS_A_SUM if source in named]
    if kept and ppo.length_normalize:
        advice = f"{kept[0]} promises a sum, which this divides; set it to false"
        yield Problem("ppo.length_normalize", advice, (_LIST,))
    spread = [source for source in kept if source != "attention"]
    if spread and ppo.interpolation == "repeat":
        advice = f"{spread[0]} promises a sum, which repeat multiplies; use even or end"
        yield Problem("ppo.interpolation", advice, (_LIST,))
