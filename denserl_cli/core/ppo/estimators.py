"""From a rollout's rewards to advantages and the critic's targets, as the recipe asks for."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from denserl_cli.core.ppo.actions import macro_actions
from denserl_cli.core.ppo.advantages import (
    adaptive_lam,
    generalized_advantages,
    group_advantages,
    returns_to_go,
    whiten,
)

if TYPE_CHECKING:
    from denserl_cli.core.ppo.rollout import Rollout
    from denserl_cli.core.recipe.schema import AdvantageName, PPOConfig


class Estimate(NamedTuple):
    """What the policy and the critic learn from.

    Attributes:
        advantages: (R, T).
        returns: (R, T), the critic's targets; None without a critic.
    """

    advantages: Tensor
    returns: Tensor | None


Estimator = Callable[["PPOConfig", Tensor, Tensor, Tensor, Tensor], Estimate]
"""Of settings, rewards (R, A), values (R, A), the mask (R, A) of A actions, and groups (R,)."""


def estimate_advantages(settings: PPOConfig, rewards: Tensor, rollout: Rollout) -> Estimate:
    """Advantages by the recipe's estimator, of tokens or of segments as macro actions.

    Args:
        settings: The recipe's `ppo`.
        rewards: (R, T), with the KL penalty where it is part of them.
        rollout: With R responses, those to one prompt beside each other.
    """
    (estimator, whitened), mask = ESTIMATORS[settings.advantage], rollout.response_mask
    groups = torch.arange(len(mask), device=mask.device) // settings.rollout.samples_per_prompt
    if settings.action == "token":
        found = estimator(settings, rewards, rollout.values, mask, groups)
    else:
        macro = macro_actions(rollout.ends, mask)
        rewards, values = macro.total(rewards), macro.mean(rollout.values)
        advantages, returns = estimator(settings, rewards, values, macro.mask, groups)
        returns = None if returns is None else macro.spread(returns)
        found = Estimate(macro.spread(advantages), returns)
    return found._replace(advantages=whiten(found.advantages, mask)) if whitened else found


def _with_critic(
    settings: PPOConfig, rewards: Tensor, values: Tensor, mask: Tensor, groups: Tensor
) -> Estimate:
    """Generalized advantage estimation; the critic's targets may have a λ of their own."""
    gamma, lam = settings.gamma, settings.lam
    decay = adaptive_lam(mask, settings.lam_alpha) if lam == "adaptive" else lam
    advantages, returns = generalized_advantages(rewards, values, mask, gamma=gamma, lam=decay)
    if settings.lam_value is not None:
        _, returns = generalized_advantages(
            rewards, values, mask, gamma=gamma, lam=settings.lam_value
        )
    return Estimate(advantages, returns)


def _by_group(
    settings: PPOConfig,
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    groups: Tensor,
    *,
    leave_one_out: bool,
) -> Estimate:
    """Against the other responses to the same prompt."""
    advantages = group_advantages(
        rewards,
        mask,
        groups,
        gamma=settings.gamma,
        leave_one_out=leave_one_out,
        baseline=settings.baseline,
        divide=settings.divide_by_std and not leave_one_out,
    )
    return Estimate(advantages, None)


def _returns(
    settings: PPOConfig, rewards: Tensor, values: Tensor, mask: Tensor, groups: Tensor
) -> Estimate:
    """The return-to-go itself; whitening it over the batch is REINFORCE++ (arXiv 2501.03262)."""
    return Estimate(returns_to_go(rewards, mask, gamma=settings.gamma), None)


ESTIMATORS: dict[AdvantageName, tuple[Estimator, bool]] = {
    "gae": (_with_critic, True),
    "group": (partial(_by_group, leave_one_out=False), False),
    "rloo": (partial(_by_group, leave_one_out=True), False),
    "reinforce++": (_returns, True),
}
"""Each estimator, and whether its advantages are whitened over all tokens of the rollout."""
