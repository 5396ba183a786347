"""The rewards of a rollout: what each source of the recipe gives, added up (`ppo.rewards`)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from denserl_cli.core.data.batches import padded
from denserl_cli.core.errors import DenserlError
from denserl_cli.core.normalizer import normalize
from denserl_cli.core.ppo.reward_functions import Responses, UserFunction, placed
from denserl_cli.core.ppo.rewards import RewardSettings, dense_rewards
from denserl_cli.core.ppo.sources.record import (
    OF_REWARD_MODEL,
    Asked,
    Inputs,
    Law,
    asked_by,
    give,
    not_measured,
    promised,
)
from denserl_cli.core.ppo.sources.table import built_in
from denserl_cli.core.precision import at_least_float32
from denserl_cli.core.segmentation import aggregate_segments, segment_ids
from denserl_cli.core.system.distributed import all_gather_object, world_size

if TYPE_CHECKING:
    from denserl_cli.core.data.conversations import Prompt
    from denserl_cli.core.normalizer import LocationNormalizer
    from denserl_cli.core.ppo.rollout import Rollout
    from denserl_cli.core.recipe.resolved import ResolvedRecipe
    from denserl_cli.core.recipe.schema import RewardSource

_TOLERANCE = 1e-3
"""How far rewards may be from the sum that their source promises, as a share of 1 + that sum."""


class SourceRewards(NamedTuple):
    """The rewards of all sources for the responses of a rollout.

    Attributes:
        tokens: (R, T), of each token before the KL penalty.
        totals: By the metric `reward_` + a source's name: its reward for each response before its
            weight, (R,). The values of the run's reward model have a metric of their own, rm_score.
        shares: What each source gave.
    """

    tokens: Tensor
    totals: dict[str, Tensor]
    shares: list[Share]


class Share(NamedTuple):
    """What one source gives.

    Attributes:
        source: Of the recipe.
        tokens: (R, T), a reward for each token.
        total: (R,), of each response.
        law: What it promises that a response's rewards add up to; None: nothing.
        promise: (R,), that sum.
    """

    source: RewardSource
    tokens: Tensor
    total: Tensor
    law: Law | None = None
    promise: Tensor | None = None


def reward_settings(recipe: ResolvedRecipe) -> RewardSettings:
    """How a recipe computes the rewards of tokens."""
    ppo = recipe.ppo
    return RewardSettings(
        interpolation=ppo.interpolation,
        segment_total=ppo.segment_total,
        softmin_temperature=ppo.softmin_temperature,
        length_normalize=ppo.length_normalize,
        clip=ppo.reward_clip,
        missing_eos_penalty=ppo.missing_eos_penalty,
        max_response_tokens=ppo.max_response_tokens,
        overlong_penalty=ppo.overlong_penalty,
        last_token_only=recipe.segmentation.granularity == "bandit",
    )


class RewardSources:
    """The sources of a recipe's rewards."""

    def __init__(
        self,
        recipe: ResolvedRecipe,
        tokenizer: Any,
        normalizers: Mapping[str, LocationNormalizer | None] | None = None,
    ) -> None:
        """Import the functions among the sources.

        Args:
            recipe: Lists the sources.
            tokenizer: Decodes responses for functions.
            normalizers: Of values, by the source's own model (empty: the run's reward model); one
                that is None leaves them as they are. None where they are not fitted yet.

        Raises:
            DenserlError: A function cannot be imported, or asks for what the run does not measure.
        """
        self.recipe, self.tokenizer = recipe, tokenizer
        self.settings = reward_settings(recipe)
        self.complete = normalizers is not None
        self.normalizers = dict(normalizers or {})
        self.sources = [self._source(one) for one in recipe.ppo.rewards]
        self.asked = [Asked(source.source, source.names) for source in self.sources]

    @property
    def normalizer(self) -> LocationNormalizer | None:
        """Of the run's own reward model."""
        return self.normalizers.get("")

    def __call__(self, prompts: Sequence[Prompt], rollout: Rollout) -> SourceRewards:
        """The rewards of a rollout, the same in every process.

        Args:
            prompts: The prompt of each response.
            rollout: With R responses.

        Raises:
            DenserlError: A function fails, or returns something that is not a reward.
        """
        shares = [source(prompts, rollout) for source in self.sources]
        tokens = dense_rewards(
            [(share.source.weight, share.tokens) for share in shares],
            rollout.response_mask,
            rollout.terminated,
            self.settings,
        )
        totals = {
            share.source.metric: share.total
            for share in shares
            if share.source.metric != "rm_score"
        }
        return SourceRewards(tokens, totals, shares)

    def _source(self, one: RewardSource) -> BuiltInSource | FunctionSource:
        source = BuiltInSource(one, self) if one.built_in else FunctionSource(one, self)
        absent: tuple[str, ...] = ("model_logprobs",)
        if not self.recipe.ppo.uses_reward_model:
            absent += OF_REWARD_MODEL
        for name in source.names:
            if one.model is None and name in absent:
                raise not_measured(one.label, name)
        if one.model is not None and not {"model_logprobs", *OF_REWARD_MODEL} & set(source.names):
            raise DenserlError(
                f"the reward {one.label} has a model of its own but asks nothing of it",
                hint="drop its `model`, or let the function ask for score or model_logprobs",
            )
        return source

    def inputs(self, rollout: Rollout, one: RewardSource, names: Collection[str]) -> Inputs:
        """What a source asks for of a rollout, by name; the rest of the record is None."""
        key, measured = one.key, rollout.measured
        bandit = self.recipe.segmentation.granularity == "bandit"
        mask, ends = rollout.response_mask, rollout.ends

        def values() -> Tensor | None:
            return measured.get((key, "token_values")) if key else rollout.token_values

        def known(function: Callable[[Tensor], Tensor]) -> Tensor | None:
            found = values()
            return None if found is None else function(found)

        def score(found: Tensor) -> Tensor:
            return aggregate_segments(found, ends, self.recipe.reward_model.aggregate)

        makers: dict[str, Callable[[], Tensor | None]] = {
            "tokens": lambda: padded(rollout.responses, mask.device),
            "mask": lambda: mask,
            "ends": lambda: ends,
            "places": lambda: mask if bandit else ends,
            "groups": lambda: segment_ids(ends, mask),
            "ended": lambda: rollout.terminated,
            "logprobs": lambda: rollout.logprobs,
            "reference_logprobs": lambda: rollout.reference_logprobs,
            "reference_entropy": lambda: rollout.entropy,
            "token_values": values,
            "normal_values": lambda: known(
                lambda found: normalize(at_least_float32(found), ends, self.normalizers.get(key))
            ),
            "final_value": lambda: known(lambda found: aggregate_segments(found, ends, "last")),
            "score": lambda: measured[key, "score"] if (key, "score") in measured else known(score),
        }
        return Inputs(
            **{
                name: makers[name]() if name in makers else measured.get((key, name))
                for name in names
            }
        )


class BuiltInSource:
    """A source that comes with denserl."""

    def __init__(self, source: RewardSource, sources: RewardSources) -> None:
        bandit = sources.recipe.segmentation.granularity == "bandit"
        self.source, self.sources = source, sources
        self.made = built_in(source, bandit=bandit)
        self.names = asked_by(self.made.function, self.made.law)

    def __call__(self, prompts: Sequence[Prompt], rollout: Rollout) -> Share:
        """Its share of a rollout's rewards."""
        inputs, law = self.sources.inputs(rollout, self.source, self.names), self.made.law
        tokens = give(self.made.function, inputs, self.source.label)
        if self.made.stands == "segments":
            tokens, total = self.sources.settings.spread(
                tokens, rollout.ends, rollout.response_mask, keep_sum=law is not None
            )
        else:
            total = tokens.sum(1)
        return Share(self.source, tokens, total, law, promised(law, inputs) if law else None)


class FunctionSource:
    """A function of the user's own."""

    def __init__(self, source: RewardSource, sources: RewardSources) -> None:
        self.source, self.sources = source, sources
        self.function = UserFunction(source.source)
        self.law = self.function.law
        self.names = asked_by(self.function.call, self.law)

    def __call__(self, prompts: Sequence[Prompt], rollout: Rollout) -> Share:
        """Its share; each process calls it once, for its part of the rows."""
        sources = self.sources
        inputs = sources.inputs(rollout, self.source, self.names)
        mine = Responses(sources.recipe, sources.tokenizer, prompts, rollout, inputs)
        theirs, size = all_gather_object(self.function(mine) if mine.rows else []), world_size()
        values = [theirs[row % size][row // size] for row in range(len(prompts))]
        where = [f"{self.function.name} for {prompt.origin}" for prompt in prompts]
        tokens, total = placed(values, rollout, sources.settings, where, keep_sum=bool(self.law))
        promise = promised(self.law, inputs) if self.law else None
        return Share(self.source, tokens, total, self.law, promise)


def broken_promises(shares: Sequence[Share], clip: float) -> list[str]:
    """What of the sources' promises does not hold for a rollout, for people.

    Args:
        shares: Of all sources.
        clip: `ppo.reward_clip`, which may change a response's sum.
    """
    broken = []
    for share in shares:
        if share.promise is None:
            continue
        wrong = _apart(share.tokens.sum(1), share.promise)
        if len(wrong):
            row = int(wrong[0])
            broken.append(
                f"the rewards of {share.source.label} do not add up to its {share.law}, as it "
                f"promises: response {row} of the first batch has {share.tokens[row].sum():.4g} "
                f"instead of {share.promise[row]:.4g}"
            )
    kept = [share.source.label for share in shares if share.law is not None]
    if kept:
        whole = torch.stack([share.source.weight * share.tokens for share in shares]).sum(0)
        cut = _apart(whole.clamp(-clip, clip).sum(1), whole.sum(1))
        if len(cut):
            broken.append(
                f"ppo.reward_clip {clip:g} changed the sum of the rewards of {len(cut)} "
                f"of the {len(whole)} responses of the first batch, so those of "
                f"{' and '.join(kept)} no longer add up to a score: raise it, or "
                "lower the source's weight"
            )
    return broken


def _apart(found: Tensor, expected: Tensor) -> Tensor:
    """Row numbers where two sums differ."""
    near = (found - expected).abs() <= _TOLERANCE * (1 + expected.abs())
    return torch.nonzero(~near)[:, 0]
