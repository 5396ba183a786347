"""A rollout to update on and to describe."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from denserl_cli.core.ppo.rollout import Rollout

PROMPTS = [np.arange(1, 1 + length, dtype=np.int32) for length in (3, 1, 7, 4, 2, 5)]
RESPONSE_LENGTHS = (2, 6, 1, 4, 6, 3)


def made_up_rollout() -> Rollout:
    """Six responses of uneven length, with plausible numbers that no model has measured."""
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    lengths = torch.tensor(RESPONSE_LENGTHS)
    mask = torch.arange(6) < lengths[:, None]

    def numbers(mean: float = 0.0) -> torch.Tensor:
        return (torch.randn(mask.shape, generator=generator) + mean) * mask

    return Rollout(
        prompts=PROMPTS,
        responses=[rng.integers(1, 20, size=n).astype(np.int32) for n in RESPONSE_LENGTHS],
        terminated=torch.tensor([True, False, True, True, False, True]),
        response_mask=mask,
        logprobs=numbers(-2.0),
        policy_entropy=numbers(2.0).abs(),
        reference_logprobs=numbers(-2.0),
        entropy=numbers(2.0).abs(),
        values=numbers(),
        token_values=numbers(),
        ends=mask & (torch.rand(mask.shape, generator=generator) < 0.5)
        | (torch.arange(6) == lengths[:, None] - 1),
    )


@pytest.fixture
def rollout() -> Rollout:
    """A rollout of its own for each test."""
    return made_up_rollout()
