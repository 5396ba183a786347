"""What follows from a recipe as written: fields that depend on others."""

from __future__ import annotations

from dataclasses import replace
from os.path import expanduser

from denserl_cli.core.recipe.schema import (
    CUT_FIELDS,
    SOURCE_DEFAULTS,
    PublishedConfig,
    Recipe,
    RewardSource,
    Source,
)


def resolved(recipe: Recipe) -> Recipe:
    """Fill in the choices that a recipe may leave to its granularity, and expand `~` in paths."""
    bandit = recipe.segmentation.granularity == "bandit"
    kind = recipe.normalizer.kind or ("global" if bandit else "location")
    interpolation = recipe.ppo.interpolation or ("end" if bandit else "even")
    value_clip = recipe.ppo.value_clip
    if value_clip is None:
        value_clip = 0.2 if bandit else 0.25
    data, model, cut = recipe.data, recipe.model, recipe.segmentation
    if cut.segment_length is None and "segment_length" in CUT_FIELDS[cut.cut]:
        cut = replace(cut, segment_length=8.0)
    if cut.cut_seed is None and cut.cut == "random":
        cut = replace(cut, cut_seed=42)
    return replace(
        recipe,
        segmentation=cut,
        model=replace(
            model,
            path=expanduser(model.path),
            tokenizer=expanduser(model.tokenizer) if model.tokenizer else None,
        ),
        data=replace(
            data,
            preferences=_at_home(data.preferences),
            evaluation=_at_home(data.evaluation),
            prompts=_at_home(data.prompts),
        ),
        normalizer=replace(recipe.normalizer, kind=kind),
        ppo=replace(
            recipe.ppo,
            interpolation=interpolation,
            value_clip=value_clip,
            critic_init=expanduser(recipe.ppo.critic_init),
            rewards=tuple(_source(one) for one in recipe.ppo.rewards),
            rollout=replace(recipe.ppo.rollout, importance=recipe.ppo.rollout.correction),
        ),
        published=_published_at_home(recipe.published),
    )


def _source(one: RewardSource) -> RewardSource:
    """A source of rewards with the settings that it leaves open."""
    open_ones = {
        name: value
        for name, value in SOURCE_DEFAULTS.get(one.source, {}).items()
        if getattr(one, name) is None
    }
    return replace(one, model=expanduser(one.model) if one.model else None, **open_ones)


def _published_at_home(published: PublishedConfig | None) -> PublishedConfig | None:
    if published is None:
        return None
    policy = expanduser(published.policy) if published.policy else None
    return replace(published, reward_model=expanduser(published.reward_model), policy=policy)


def _at_home(sources: tuple[Source, ...]) -> tuple[Source, ...]:
    return tuple(replace(source, path=expanduser(source.path)) for source in sources)
