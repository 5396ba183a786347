"""Responses token by token (traces), and their segments and rewards under a cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from denserl_cli.core.chat.decoding import joined
from denserl_cli.core.normalizer import normalize
from denserl_cli.core.ppo.reward_sources import reward_settings
from denserl_cli.core.ppo.rewards import RewardSettings, dense_rewards
from denserl_cli.core.precision import at_least_float32
from denserl_cli.core.segmentation import aggregate_segments, segment_ends

if TYPE_CHECKING:
    from denserl_cli.core.normalizer import LocationNormalizer
    from denserl_cli.core.recipe.resolved import ResolvedRecipe
    from denserl_cli.core.recipe.schema import Aggregate, Granularity


@dataclass(frozen=True)
class Segment:
    """One segment of a response.

    Attributes:
        text: Of its tokens.
        start: Number of its first token in the response.
        end: Number of its last token.
        entropy: Nats, after its last token; None at the end of the response.
        value: The reward model's; None without a reward model.
        reward: The value, normalised by location; None without a normaliser.
        per_token: The reward that PPO would give to its last token (and to each of its tokens,
            unless `ppo.interpolation` is end) for the reward model's value alone, before KL and
            penalties; None where PPO could not start or these values are no source of its rewards.
    """

    text: str
    start: int
    end: int
    entropy: float | None
    value: float | None
    reward: float | None
    per_token: float | None


@dataclass(frozen=True)
class SegmentedResponse:
    """A response in segments.

    Attributes:
        label: Its name for people.
        side: chosen or rejected, if it is one of a pair; else empty.
        prompt: Text of the turn before it.
        terminated: False where it was truncated at the length limit.
        segments: In order.
        score: The reward model's, of the whole response; None without a reward model.
    """

    label: str
    side: str
    prompt: str
    terminated: bool
    segments: list[Segment]
    score: float | None


@dataclass(frozen=True, eq=False)
class Trace:
    """A response as the models read it: all that its segments and rewards at any cutoff need.

    Attributes:
        label: Its name for people.
        side: chosen or rejected, if it is one of a pair; else empty.
        prompt: Text of the turn before it.
        terminated: False where it was truncated at the length limit.
        texts: Of each of its T tokens, the terminator included.
        ends: (T,) bool, of the segments of the recipe that it was read with.
        entropy: (T,), nats, of the reference after each token; None where it was not computed.
        values: (T,), the reward model's at each token; None where they were not computed.
    """

    label: str
    side: str
    prompt: str
    terminated: bool
    texts: list[str]
    ends: NDArray[np.bool_]
    entropy: NDArray[np.float32] | None
    values: NDArray[np.float32] | None

    @property
    def text(self) -> str:
        """The response with its terminator."""
        return "".join(self.texts)


class Cut(NamedTuple):
    """How responses are cut, and how their segments are rewarded.

    Attributes:
        granularity: The recipe's.
        cutoff: Nats; None where segments do not depend on one: those of the trace are used.
        normalizer: Of the reward model's values; None where there is none.
        ready: Whether PPO could start: its normaliser is there or not needed.
        aggregate: How the reward model scores a response.
        rewards: How PPO would compute token rewards.
        rule: The recipe's `segmentation.cut`.
        weight: Of the reward model's values among the sources of rewards; None: they are none.
    """

    granularity: Granularity
    cutoff: float | None
    normalizer: LocationNormalizer | None
    ready: bool
    aggregate: Aggregate
    rewards: RewardSettings
    rule: str = "entropy"
    weight: float | None = 1.0

    @classmethod
    def of(cls, recipe: ResolvedRecipe, normalizer: LocationNormalizer | None) -> Cut:
        """The cut of a recipe."""
        cut, ready = recipe.segmentation, recipe.normalizer.kind == "none" or normalizer is not None
        how = recipe.reward_model.aggregate
        # the responses are not the policy's, so how they end is not penalised
        rewards = reward_settings(recipe)._replace(
            missing_eos_penalty=None, max_response_tokens=None, overlong_penalty=None
        )
        weights = [
            one.weight
            for one in recipe.ppo.rewards
            if one.source == "values" and one.reads_reward_model
        ]
        weight = sum(weights) if weights else None
        return cls(cut.granularity, cut.cutoff, normalizer, ready, how, rewards, cut.cut, weight)

    @property
    def pays(self) -> bool:
        """Whether PPO could start and would pay the reward model's values."""
        return self.ready and self.weight is not None

    @property
    def at_peaks(self) -> bool:
        """Whether segments inside a response end where the entropy is high."""
        return self.cutoff is not None or (
            self.granularity == "segment" and self.rule == "quantile"
        )

    @property
    def description(self) -> str:
        """What decides about the segments, for people."""
        if self.cutoff is not None:
            return f"cutoff {self.cutoff:.6g}"
        return {"token": "every token", "bandit": "whole responses"}.get(
            self.granularity, f"cut {self.rule}"
        )

    def ends(self, trace: Trace) -> Tensor:
        """The segment ends of a response, (1, T) bool."""
        if self.cutoff is None:
            return torch.from_numpy(trace.ends)[None]
        assert trace.entropy is not None
        return segment_ends(
            torch.from_numpy(trace.entropy)[None],
            torch.ones(1, len(trace.texts), dtype=torch.bool),
            granularity="segment",
            cutoff=self.cutoff,
            terminated=torch.tensor([trace.terminated]),
        )

    def __call__(self, trace: Trace) -> SegmentedResponse:
        """The response in segments."""
        marks = self.ends(trace)
        ends = torch.nonzero(marks[0])[:, 0].tolist()
        rewards = self._rewards(trace, marks)
        segments = []
        for k, (text, end) in enumerate(zip(joined(trace.texts, ends), ends, strict=True)):
            start = ends[k - 1] + 1 if k else 0
            entropy = None
            if trace.entropy is not None and end < len(trace.texts) - 1:
                entropy = float(trace.entropy[end])
            segments.append(Segment(text, start, end, entropy, *rewards[k]))
        score = None
        if trace.values is not None:
            values = torch.from_numpy(trace.values)[None]
            score = aggregate_segments(values, marks, self.aggregate).item()
        head = (trace.label, trace.side, trace.prompt, trace.terminated)
        return SegmentedResponse(*head, segments, score)

    def _rewards(
        self, trace: Trace, marks: Tensor
    ) -> list[tuple[float | None, float | None, float | None]]:
        """Raw value, normalised reward and reward per token of each segment."""
        ends = torch.nonzero(marks[0])[:, 0]
        if trace.values is None:
            return [(None, None, None)] * len(ends)
        values = torch.from_numpy(trace.values)[None]
        rewards: list[float | None] = [None] * len(ends)
        per_token = rewards
        if self.normalizer is not None:
            normal = normalize(values.double(), marks, self.normalizer)
            rewards = list(normal[0, ends].tolist())
        if self.ready and self.weight is not None:
            whole = torch.ones_like(marks)
            ended = torch.ones(1, dtype=torch.bool)
            normal = normalize(at_least_float32(values), marks, self.normalizer)
            spread, _ = self.rewards.spread(normal, marks, whole)
            given = dense_rewards([(self.weight, spread)], whole, ended, self.rewards)
            per_token = list(given[0, ends].tolist())
        raw = values[0, ends].double().tolist()
        return list(zip(raw, rewards, per_token, strict=True))


Sided = TypeVar("Sided", bound=SegmentedResponse | Trace)


def in_pairs(responses: Sequence[Sided]) -> list[list[Sided]]:
    """Group responses: the chosen and the rejected one of a pair together, others alone."""
    groups: list[list[Sided]] = []
    for response in responses:
        if response.side == "rejected" and groups and groups[-1][-1].side == "chosen":
            groups[-1].append(response)
        else:
            groups.append([response])
    return groups
