"""What must hold before the first update, whatever the model: it is what samples and what learns.

Both tests cost nothing: they read what rollout and update have computed anyway.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from denserl_cli.core.errors import DenserlError

if TYPE_CHECKING:
    from denserl_cli.core.ppo.rollout import Rollout

RATIO_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.01}
"""Nats a token between the policy and itself that rounding may make, by compute type."""


def refuse_other_samples(rollout: Rollout) -> None:
    """Raise DenserlError when responses were not drawn from the distributions that were measured.

    The expectation of log p of a drawn token is minus the entropy of its distribution, so the sum
    of both is a martingale: its mean is 0 but for chance (and above 0 with top-p).

    Args:
        rollout: Of a policy that sampled and scored with the same weights.
    """
    if rollout.policy_entropy is None:
        return  # the sampler's own log-probabilities, which say nothing about the policy
    drawn = (rollout.logprobs + rollout.policy_entropy)[rollout.response_mask].double()
    if len(drawn) < 32:
        return
    mean, error = drawn.mean().item(), (drawn.std() / math.sqrt(len(drawn))).item()
    if mean < -0.1 and mean < -6 * error:
        raise DenserlError(
            f"the sampled tokens are not those of the policy: its log-probability of them is "
            f"{-mean:.2f} nats a token below what its entropy says, after {len(drawn)} tokens",
            hint="its architecture reads with a cache of keys otherwise than without; name another "
            "model, or try --set model.attention=eager",
        )


def refuse_other_ratio(kl: float, tolerance: float) -> None:
    """Raise DenserlError when the policy's ratio to itself is not 1 before its first update.

    Args:
        kl: Mean of r - 1 - log r over the tokens of the first train batch, in nats.
        tolerance: What rounding may make of it.
    """
    if kl > tolerance:
        raise DenserlError(
            "the policy's probability ratio to itself is not 1 before the first update: in "
            f"training it is {kl:.2g} nats a token away from what was measured on its samples "
            f"(rounding makes up to {tolerance:g})",
            hint="something in the model is random, or depends on the batch, in training alone; "
            "look for noise in its config.json, or name another model",
        )
