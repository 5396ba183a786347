"""Choices of action, advantage and losses that contradict each other."""

from __future__ import annotations

from collections.abc import Iterator

from denserl_cli.core.recipe.mapping_checks import Problem
from denserl_cli.core.recipe.schema import CRITIC_WORDS, PPOConfig, Recipe


def advantage_problems(recipe: Recipe) -> Iterator[Problem]:
    """Yield what `ppo` says of actions, advantages and losses that makes no sense together."""
    ppo, granularity = recipe.ppo, recipe.segmentation.granularity
    if ppo.action == "segment" and granularity == "bandit":
        advice = "bandit has one segment, so every response would be one action; use token"
        yield Problem("ppo.action", advice, ("segmentation.granularity",))
    if ppo.dual_clip is not None and 0 < ppo.dual_clip <= 1:
        advice = f"must be above 1, or it undoes the clip range; not {ppo.dual_clip}"
        yield Problem("ppo.dual_clip", advice)
    if ppo.kl_loss is not None and ppo.kl_coef == 0:
        advice = "the loss would add 0 times the KL; set it above 0"
        yield Problem("ppo.kl_coef", advice, ("ppo.kl_loss",))
    if recipe.reward_model.label_smoothing >= 0.5:
        advice = "must be below 0.5, or nothing, or the contrary, is learned"
        yield Problem("reward_model.label_smoothing", advice)
    yield from _critic(ppo) if ppo.has_critic else _no_critic(ppo)


def _critic(ppo: PPOConfig) -> Iterator[Problem]:
    init, rollouts, given = ppo.critic_init, ppo.critic_warmup_rollouts, ("ppo.advantage",)
    if init not in CRITIC_WORDS and "/" not in init:
        words = ", ".join(CRITIC_WORDS)
        advice = f"{init!r} is neither of {words}, nor a folder or hub name; a folder is ./{init}"
        yield Problem("ppo.critic_init", advice)
    if rollouts is not None and rollouts > ppo.critic_warmup:
        advice = f"{rollouts} are more than the {ppo.critic_warmup} iterations of critic_warmup"
        yield Problem("ppo.critic_warmup_rollouts", advice, ("ppo.critic_warmup",))
    for name, wanted in (("baseline", "response"), ("divide_by_std", True)):
        if getattr(ppo, name) != wanted:
            advice = "belongs to the advantages by group; gae compares with a critic"
            yield Problem(f"ppo.{name}", advice, given)


def _no_critic(ppo: PPOConfig) -> Iterator[Problem]:
    name, given = ppo.advantage, ("ppo.advantage",)
    by_group = name in ("group", "rloo")
    if by_group and ppo.rollout.samples_per_prompt < 2:
        advice = f"{name} compares responses to one prompt; set it to 2 or more"
        yield Problem("ppo.rollout.samples_per_prompt", advice, given)
    unused: dict[str, object] = {
        **{"critic_init": "policy", "critic_warmup": 0, "critic_warmup_rollouts": None},
        **{"save_critic": False, "lam_value": None},
    }
    for field, default in unused.items():
        if getattr(ppo, field) != default:
            advice = f"{name} has no critic; leave it out, or set ppo.advantage to gae"
            yield Problem(f"ppo.{field}", advice, given)
    if ppo.lam == "adaptive":
        yield Problem("ppo.lam", f"{name} has no lambda; leave it out", given)
    if not by_group and ppo.baseline != "response":
        yield Problem("ppo.baseline", f"{name} has no baseline; leave it out", given)
    if name != "group" and not ppo.divide_by_std:
        yield Problem("ppo.divide_by_std", f"{name} is never divided; leave it out", given)
