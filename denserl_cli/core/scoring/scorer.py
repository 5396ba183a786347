"""The frozen reference and the reward model, run over responses: the one way to get segments."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from denserl_cli.core.engine.frozen import CpuOffloaded, called
from denserl_cli.core.errors import DenserlError
from denserl_cli.core.models.causal_lm import response_logprobs
from denserl_cli.core.models.device import autocast
from denserl_cli.core.models.scalar_head import token_values
from denserl_cli.core.models.sequence_classifier import SequenceReward
from denserl_cli.core.segmentation_rules import Cutter

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from denserl_cli.core.data.batches import SequenceBatch
    from denserl_cli.core.recipe.schema import SegmentationConfig


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
    """Segments responses with the reference and, when there is one, values them with the RM.

    tokenizer: needed where the text decides about the segments.
    """

    def __init__(
        self,
        segmentation: SegmentationConfig,
        *,
        reference: PreTrainedModel | None,
        reward_model: PreTrainedModel | SequenceReward | None = None,
        dtype: torch.dtype = torch.float32,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        self.cut = Cutter(segmentation, tokenizer)
        self.reference = reference
        self.reward_model = reward_model
        self.dtype = dtype
        self.offloaded: CpuOffloaded | None = None

    def offload(self, device: torch.device) -> None:
        """Leave the models in the CPU's memory, except inside `on_device`."""
        reward = self.reward_model
        held = (self.reference, reward.model if isinstance(reward, SequenceReward) else reward)
        self.offloaded = CpuOffloaded([model for model in held if model is not None], device)

    def on_device(self) -> AbstractContextManager[None]:
        """The models on their device for the while, if they rest elsewhere."""
        return nullcontext() if self.offloaded is None else self.offloaded.on_device()

    @torch.no_grad()
    def __call__(
        self,
        batch: SequenceBatch,
        terminated: Tensor | None = None,
        *,
        temperature: float = 1.0,
    ) -> ScoredBatch:
        """Score a batch; one pass of the reference gives log-probabilities and entropies.

        terminated: (R,) bool, whether each response ended by itself; default all.
        """
        mask = batch.response_mask
        logprobs = entropy = values = None
        with autocast(mask.device, self.dtype):
            if self.reference is not None:
                logprobs, entropy = called(
                    self.reference, response_logprobs, batch, temperature=temperature
                )
            if self.reward_model is not None:
                values = (
                    self.reward_model(batch)
                    if isinstance(self.reward_model, SequenceReward)
                    else called(self.reward_model, token_values, batch)
                )
        ends = self.cut(batch.responses, entropy, mask, terminated)
        return ScoredBatch(ends, entropy, logprobs, values)


def check_finite(score: float, origin: str) -> None:
    """Raise DenserlError for a score that is not a number. origin: what was scored."""
    if not math.isfinite(score):
        raise DenserlError(
            f"{origin}: the reward model's score is {score}",
            hint="its weights are damaged or overflow; try --set model.dtype=float32",
        )
