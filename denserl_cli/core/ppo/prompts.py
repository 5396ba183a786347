"""Which prompts each iteration sees."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from denserl_cli.core.data.conversations import Prompt

EVALUATION = 2**31
"""Iteration number in the noise keys of evaluation samples; no training iteration reaches it."""


class PromptBatch(NamedTuple):
    """Prompts of one rollout, repeated for each sample, and the noise key of each response."""

    prompts: list[Prompt]
    keys: list[tuple[int, ...]]

    @property
    def ids(self) -> list[np.ndarray]:
        """Token ids of each prompt."""
        return [prompt.ids for prompt in self.prompts]


class PromptPlan:
    """The order of the prompts: shuffled anew in each pass, full batches only."""

    def __init__(
        self,
        prompts: Sequence[Prompt],
        batches: Sequence[np.ndarray],
        *,
        samples: int,
        seed: int,
        warmup: int = 0,
        warmup_rollouts: int | None = None,
    ) -> None:
        """Set up a plan.

        Args:
            prompts: All prompts.
            batches: Row numbers of the prompts of each iteration.
            samples: Responses for each prompt.
            seed: Of the noise.
            warmup: First iterations, in which the policy does not change.
            warmup_rollouts: Rollouts that these go over again and again; None: each has its own.
        """
        self.prompts, self.batches = prompts, batches
        self.samples, self.seed = samples, seed
        self.warmup, self.warmup_rollouts = warmup, warmup_rollouts

    @property
    def iterations(self) -> int:
        """Number of rollout batches."""
        return len(self.batches)

    def source(self, iteration: int) -> int:
        """The iteration, counted from 1, whose prompts and noise an iteration takes again."""
        if self.warmup_rollouts is None or iteration > self.warmup:
            return iteration
        return (iteration - 1) % self.warmup_rollouts + 1

    def batch(self, iteration: int) -> PromptBatch:
        """The prompts of an iteration, counted from 1."""
        iteration = self.source(iteration)
        rows = [int(row) for row in self.batches[iteration - 1] for _ in range(self.samples)]
        seen = Counter[int]()  # the end of one pass and the start of the next may share a prompt
        keys: list[tuple[int, ...]] = []
        for row in rows:
            keys.append((self.seed, iteration, row, seen[row]))
            seen[row] += 1
        return PromptBatch([self.prompts[row] for row in rows], keys)


def evaluation_batch(prompts: Sequence[Prompt], seed: int, samples: int = 1) -> PromptBatch:
    """`samples` responses for each evaluation prompt, with the same noise at every evaluation."""
    chosen = [(row, n) for row in range(len(prompts)) for n in range(samples)]
    return PromptBatch(
        [prompts[row] for row, _ in chosen], [(seed, EVALUATION, row, n) for row, n in chosen]
    )
