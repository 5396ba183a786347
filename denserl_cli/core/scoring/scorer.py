"""The frozen reference and the reward model, run over responses: where all segments come from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from denserl_cli.core.errors import DenserlError
from denserl_cli.core.models.causal_lm import response_logprobs
from denserl_cli.core.models.scalar_head import Reading, token_values
from denserl_cli.core.segmentation_rules import Cutter

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from denserl_cli.core.data.batches import SequenceBatch
    from denserl_cli.core.engine.frozen import FrozenModel
    from denserl_cli.core.recipe.resolved import ResolvedSegmentation
    from denserl_cli.core.scoring.measures import Measure

ReadValues = Callable[[Any, "SequenceBatch"], Tensor | Reading]
"""Reads a reward model: takes it and a batch, returns values, (R, T), used at segment ends."""


class ScoredBatch(NamedTuple):
    """What reference and reward model computed on R responses.

    All are (R, T), zero where masked, unless another shape is given; all but `ends` are None where
    they were not computed.

    Attributes:
        ends: bool, of the segments.
        entropy: Nats, of the reference after each token.
        reference_logprobs: Nats, of each token.
        token_values: The reward model's at each token.
        measured: What sources of rewards asked for beyond that, (R, T) or (R,), by the model that
            it is of (empty: the run's reward model) and by name.
    """

    ends: Tensor
    entropy: Tensor | None
    reference_logprobs: Tensor | None
    token_values: Tensor | None
    measured: dict[tuple[str, str], Tensor]


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
        measures: Sequence[Measure] = (),
        packs: bool = False,
    ) -> None:
        """Set up a scorer.

        Args:
            segmentation: Where responses are cut.
            reference: Needed where segments depend on its entropies.
            reward_model: None where values are not needed.
            read: How the reward model's value at each token is read.
            tokenizer: Needed where segments depend on the text.
            measures: What sources of rewards ask for beyond values and log-probabilities.
            packs: Whether all its models read packed sequences.
        """
        self.packs = packs
        self.cut = Cutter(segmentation, tokenizer)
        self.reference, self.reward_model, self.read = reference, reward_model, read
        self.measures = measures

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Hold the models' weights on their devices for all batches inside."""
        with ExitStack() as stack:
            models = [self.reference, self.reward_model, *(one.model for one in self.measures)]
            for model in {id(model): model for model in models if model is not None}.values():
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
        measured: dict[tuple[str, str], Tensor] = {}
        if self.reference is not None:
            logprobs, entropy = self.reference(response_logprobs, batch, temperature=temperature)
        if self.reward_model is not None:
            read = self.reward_model(self.read, batch)
            values, more = read if isinstance(read, Reading) else (read, {})
            measured |= {("", name): found for name, found in more.items()}
        ends = self.cut(batch.responses, entropy, batch.response_mask, terminated)
        for measure in self.measures:
            found = measure(batch, ends, temperature)
            measured |= {(measure.key, name): one for name, one in found.items()}
        return ScoredBatch(ends, entropy, logprobs, values, measured)


def check_finite(score: float, origin: str) -> None:
    """Raise DenserlError, naming `origin`, for a score that is not finite."""
    if not math.isfinite(score):
        raise DenserlError(
            f"{origin}: the reward model's score is {score}",
            hint="its weights are damaged or overflow; try --set model.dtype=float32",
        )
