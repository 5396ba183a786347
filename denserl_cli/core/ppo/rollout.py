"""Sampling from the policy, and what a rollout holds."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from torch import Tensor


class Rollout(NamedTuple):
    """Responses and everything that was measured on them, for one iteration.

    prompts, responses: id arrays of the R rows. All tensors are (R, T), zero where masked, T the
    longest response: response_mask; logprobs of the policy that sampled; policy_entropy of what it
    drew each token from; reference_logprobs; entropy of the reference after each token; values of
    the critic in the state before each token; token_values of the reward model at each token, None
    without one; ends of the segments. terminated: (R,).
    """

    prompts: list[np.ndarray]
    responses: list[np.ndarray]
    terminated: Tensor
    response_mask: Tensor
    logprobs: Tensor
    policy_entropy: Tensor
    reference_logprobs: Tensor
    entropy: Tensor
    values: Tensor
    token_values: Tensor | None
    ends: Tensor
