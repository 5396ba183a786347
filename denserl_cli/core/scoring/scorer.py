"""The frozen reference and the reward model, run over responses: where all segments come from."""

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
"""Reads a reward model: takes it and a batch, returns values, (R, T), used at segment ends."""


class ScoredBatch(NamedTuple):
    """What reference and reward model computed on R responses.

    All are (R, T), zero where masked; all but `ends` are None where they were not computed.

    Attributes:
        ends: bool, of the segments.
        entropy: Nats, of the reference after each token.
        reference_logprobs: Nats, of each token.
        token_values: The reward model's at each token.
    """

    ends: Tensor
    entropy: Tensor | None
    reference_logprobs: Tensor | None
    token_values: Tensor | None


class Scorer:
    """Segments responses with the reference and, if there is one, runs the reward model on them."""

    def __init__(
        self,
        segmentation: ResolvedSegmentation,
        *,
        reference: FrozenModel | None,
        reward_model: FrozenModel | None = None,
        read: ReadValues = token_values,
        tokenizer: PreTrainedTokenizerBase | None = None,
        packs: bool = False,
    ) -> None:
        """Set up a scorer.

        Args:
            segmentation: Where responses are cut.
            reference: Needed where segments depend on its entropies.
            reward_model: None where values are not needed.
            read: How the reward model's value at each token is read.
            tokenizer: Needed where segments depend on the text.
            packs: Whether all its models read packed sequences.
        """
        self.packs = packs
        self.cut = Cutter(segmentation, tokenizer)
        self.reference, self.reward_model, self.read = reference, reward_model, read

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Hold the models' weights on their devices for all batches inside."""
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
            terminated: (R,) bool, whether each response ended by itself; None: all did.
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
    """Raise DenserlError, naming `origin`, for a score that is not finite."""
    if not math.isfinite(score):
        raise DenserlError(
            f"{origin}: the reward model's score is {score}",
            hint="its weights are damaged or overflow; try --set model.dtype=float32",
        )
