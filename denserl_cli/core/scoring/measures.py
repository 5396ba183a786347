"""What sources of rewards ask of models beyond the values that the scorer reads anyway.

A measure is run on each batch after the scorer's own passes. What it finds has the names by which
sources ask for it (`ppo.sources.record`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from denserl_cli.core.data.batches import by_length, collate_sequences
from denserl_cli.core.models.causal_lm import response_logprobs
from denserl_cli.core.models.scalar_head import Reading, token_values
from denserl_cli.core.models.sequence_classifier import SequenceReader
from denserl_cli.core.ppo.sources.shapley import (
    EXACT,
    all_coalitions,
    exact_shapley,
    joined,
    permutations,
    sampled_shapley,
)
from denserl_cli.core.segmentation import aggregate_segments

if TYPE_CHECKING:
    from denserl_cli.core.data.batches import SequenceBatch
    from denserl_cli.core.engine.frozen import FrozenModel
    from denserl_cli.core.recipe.schema import Aggregate

Ids = np.ndarray
Found = dict[str, Tensor]
"""By name, (R, T) or (R,)."""


class Measure(Protocol):
    """A further measurement of a batch.

    Attributes:
        model: The frozen model that it runs.
        key: Whose numbers these are: the source's own model, or empty for the run's reward model.
    """

    model: FrozenModel
    key: str

    def __call__(self, batch: SequenceBatch, ends: Tensor, temperature: float) -> Found:
        """Measure a batch; ends: (R, T) bool, of its segments."""


class Scoring(NamedTuple):
    """How a reward model's values make the score of a response.

    Attributes:
        aggregate: How the values at segment ends become one number; None: the score is the value
            at the last token, as of a model that was trained on whole responses.
    """

    aggregate: Aggregate | None

    def __call__(self, values: Tensor, ends: Tensor, mask: Tensor) -> Tensor:
        """The score of each response, (R,); values, ends and mask are (R, T)."""
        if self.aggregate is None:
            return _last(values, mask)
        return aggregate_segments(values, ends, self.aggregate)


def _last(values: Tensor, mask: Tensor) -> Tensor:
    """The value at the last True of each row, (R,); 0 where there is none."""
    number = mask.cumsum(1)
    return (values * (mask & (number == number[:, -1:]))).sum(1)


class PolicyMeasure:
    """Log-probabilities of a further policy."""

    def __init__(self, key: str, model: FrozenModel) -> None:
        self.key, self.model = key, model

    def __call__(self, batch: SequenceBatch, ends: Tensor, temperature: float) -> Found:
        """Its log-probability of each token, at the temperature of the reference's."""
        found = self.model(response_logprobs, batch, temperature=temperature, with_entropy=False)
        return {"model_logprobs": found.logprobs}


class RewardMeasure:
    """Values and score of a further reward model, in one pass."""

    def __init__(
        self, key: str, model: FrozenModel, read: Callable[..., Any], scoring: Scoring
    ) -> None:
        self.key, self.model, self.read, self.scoring = key, model, read, scoring

    def __call__(self, batch: SequenceBatch, ends: Tensor, temperature: float) -> Found:
        """Its value at each token, its score, and what else its reader gives.

        Where it scores whole responses, its value at the last segment's end is that of the whole
        response, so that values at segment ends end in the score.
        """
        found, more = self.read_batch(batch)
        score = self.scoring(found, ends, batch.response_mask)
        if self.scoring.aggregate is None:
            number = ends.cumsum(1)
            found = torch.where(ends & (number == number[:, -1:]), score[:, None], found)
        return {"token_values": found, "score": score, **more}

    def read_batch(self, batch: SequenceBatch) -> Reading:
        """One pass over a batch."""
        found = self.model(self.read, batch)
        return found if isinstance(found, Reading) else Reading(found, {})


class ShapleyMeasure:
    """Shapley values of segments: a reward model's score of many parts of each response."""

    def __init__(
        self,
        key: str,
        model: FrozenModel,
        read: Callable[..., Any],
        scoring: Scoring,
        *,
        orders: int,
        seed: int,
        batch_size: int,
        pad_id: int,
    ) -> None:
        """Set up the measure.

        Args:
            key: As of `Measure`.
            model: A reward model.
            read: Reads it.
            scoring: How it scores a response.
            orders: Permutations drawn for a response of more than `EXACT` segments.
            seed: Of the permutations, beside the response itself.
            batch_size: Parts of responses that are scored together.
            pad_id: Token that fills batches up.
        """
        self.key, self.model, self.read, self.scoring = key, model, read, scoring
        self.orders, self.seed = orders, seed
        self.batch_size, self.pad_id = batch_size, pad_id

    def __call__(self, batch: SequenceBatch, ends: Tensor, temperature: float) -> Found:
        """Shapley values at segment ends, and the score without any segment."""
        rows = [Parts.of(*ids, ends[row]) for row, ids in enumerate(batch.rows())]
        drawn = [permutations(len(one.segments), self.orders, self._seed(one)) for one in rows]
        asked = [_coalitions(order) for order in drawn]
        parts = [
            one.part(members.numpy())
            for one, wanted in zip(rows, asked, strict=True)
            for members in wanted
        ]
        worth = self._worth(parts).to(ends.device).split([len(wanted) for wanted in asked])
        found = torch.zeros(ends.shape, device=ends.device)
        for row, (order, one) in enumerate(zip(drawn, worth, strict=True)):
            exact = order.shape[1] <= EXACT
            found[row, ends[row]] = (
                exact_shapley(one) if exact else sampled_shapley(one[1:-1], one[0], one[-1], order)
            )
        empty, whole = (torch.stack([one[place] for one in worth]) for place in (0, -1))
        return {"shapley_values": found, "empty_score": empty, "score": whole}

    def _seed(self, one: Parts) -> bytes:
        """Depends on the response alone, not on its batch."""
        ids = np.concatenate([one.prompt, [-1], *one.segments, one.rest]).astype(np.int64)
        return hashlib.blake2b(ids.tobytes() + str(self.seed).encode(), digest_size=16).digest()

    def _worth(self, parts: Sequence[tuple[Ids, Ids, Ids]]) -> Tensor:
        """The score of each part of a response: prompt, tokens and segment ends; (N,)."""
        lengths = [len(prompt) + len(ids) for prompt, ids, _ in parts]
        worth = torch.zeros(len(parts))
        for chosen in by_length(lengths, np.arange(len(parts)), self.batch_size):
            worth[torch.from_numpy(chosen)] = self._scores([parts[i] for i in chosen]).cpu()
        return worth

    def _scores(self, parts: Sequence[tuple[Ids, Ids, Ids]]) -> Tensor:
        if isinstance(self.read, SequenceReader):
            return self.model(self.read.scores, [(prompt, ids) for prompt, ids, _ in parts])
        # a part without any token is read after the prompt, as a response of its last token
        moved = [len(ids) == 0 for _, ids, _ in parts]
        prompts = [p[:-1] if empty else p for (p, _, _), empty in zip(parts, moved, strict=True)]
        responses = [p[-1:] if empty else r for (p, r, _), empty in zip(parts, moved, strict=True)]
        batch = collate_sequences(prompts, responses, self.pad_id, self.model.device)
        ends = torch.zeros_like(batch.response_mask)
        for row, (_, _, places) in enumerate(parts):
            ends[row, torch.from_numpy(places)] = True
        return self.scoring(self.model(token_values, batch), ends, batch.response_mask)


class Parts(NamedTuple):
    """A response in its segments.

    Attributes:
        prompt: Token ids.
        segments: Token ids of each.
        rest: What belongs to no segment: a terminator.
    """

    prompt: Ids
    segments: list[Ids]
    rest: Ids

    @classmethod
    def of(cls, prompt: Ids, response: Ids, ends: Tensor) -> Parts:
        """Cut a response after its segment ends; ends: (T,) bool."""
        cuts = np.nonzero(ends.cpu().numpy())[0] + 1
        *segments, rest = np.split(response, cuts)
        return cls(prompt, segments, rest)

    def part(self, members: np.ndarray) -> tuple[Ids, Ids, Ids]:
        """The prompt, the tokens of some segments in their order and the rest, and their ends."""
        kept = [one for one, is_in in zip(self.segments, members, strict=True) if is_in]
        ends = np.cumsum([len(one) for one in kept], dtype=np.int64) - 1
        return self.prompt, np.concatenate([*kept, self.rest]), ends


def _coalitions(orders: np.ndarray) -> Tensor:
    """The coalitions to score: the empty one first, the whole one last; (N, K) bool."""
    players = orders.shape[1]
    if players <= EXACT:
        return all_coalitions(players)
    ends = torch.zeros(1, players, dtype=torch.bool)
    return torch.cat([ends, joined(orders), ~ends])
