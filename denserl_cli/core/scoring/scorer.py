"""The frozen reference and the reward model, run over responses: the one way to get segments."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from denserl_cli.core.errors import DenserlError
from denserl_cli.core.models.causal_lm import response_logprobs
from denserl_cli.core.models.scalar_head import token_values
from denserl_cli.core.segmentation_rules import Cutter

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from denserl_cli.core.data.batches import SequenceBatch
    from denserl_cli.core.engine.frozen import FrozenModel
    from denserl_cli.core.recipe.resolved import ResolvedSegmentation

ReadValues = Callable[[Any, "SequenceBatch"], Tensor]
"""Reads a reward model: from it and a batch to values, (R, T), that count at segment ends."""


class ScoredBatch(NamedTuple):
    """What reference and reward model say about responses; (R, T) each, zero where masked.

    ends: of the segments. entropy: the reference's, after each token. reference_logprobs: of each
    token. token_values: the reward model's. The last three are None where they were not computed.
    """

    ends: Tensor
    entropy: Tensor | None
    reference_logprobs: Tensor | None
    token_values: Tensor | None


class Scorer:
    """Segments responses with the reference and, when there is one, values them with the RM."""

    def __init__(
        self,
        segmentation: ResolvedSegmentation,
        *,
        reference: FrozenModel | None,
        reward_model: FrozenModel | None = None,
        read: ReadValues = token_values,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        """Keep the models.

        Args:
            segmentation: Where responses are cut.
            reference: Needed where segments depend on its entropies.
            reward_model: None where nobody asks for values.
            read: How the reward model's value at each token is read.
            tokenizer: Needed where the text decides about the segments.
        """
        self.cut = Cutter(segmentation, tokenizer)
        self.reference, self.reward_model, self.read = reference, reward_model, read

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Hold the models' weights where they are used, for as many batches as there are inside."""
        with ExitStack() as stack:
            for model in (self.reference, self.reward_model):
                if model is not None:
                    stack.enter_context(model.on_device())
            yield

    @torch.no_grad()
    def __call__(
        self,
        batch: SequenceBatch,
        terminated: Tensor | None = None,
        *,
        temperature: float = 1.0,
    ) -> ScoredBatch:
        """Score a batch; one pass of the reference gives log-probabilities and entropies.

        Args:
            batch: Of R sequences.
            terminated: (R,) bool, whether each response ended by itself; default all.
            temperature: Of the log-probabilities; entropies are those at 1.
        """
        logprobs = entropy = values = None
        if self.reference is not None:
            logprobs, entropy = self.reference(response_logprobs, batch, temperature=temperature)
        if self.reward_model is not None:
            values = self.reward_model(self.read, batch)
        ends = self.cut(batch.responses, entropy, batch.response_mask, terminated)
        return ScoredBatch(ends, entropy, logprobs, values)


def check_finite(score: float, origin: str) -> None:
    """Raise DenserlError for a score that is not a number. origin: what was scored."""
    if not math.isfinite(score):
        raise DenserlError(
            f"{origin}: the reward model's score is {score}",
            hint="its weights are damaged or overflow; try --set model.dtype=float32",
        )
