"""Dense rewards of a rollout: normalise, spread, penalise (method §5)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from denserl_cli.core.errors import DenserlError
from denserl_cli.core.normalizer import normalize
from denserl_cli.core.precision import at_least_float32

if TYPE_CHECKING:
    from denserl_cli.core.normalizer import LocationNormalizer

Interpolation = Literal["even", "repeat", "end"]
SegmentTotal = Literal["sum", "mean", "softmin"]
_AT_END: Interpolation = "end"


class RewardSettings(NamedTuple):
    """How values become the rewards of tokens (`ppo.*`).

    The other attributes, and their defaults, are as in `spread_rewards` and `replace_penalized`.

    Attributes:
        last_token_only: Penalties go to the last token alone (bandit).
    """

    interpolation: Interpolation = "even"
    segment_total: SegmentTotal = "sum"
    softmin_temperature: float = 0.1
    length_normalize: bool = False
    clip: float = 10.0
    missing_eos_penalty: float | None = None
    max_response_tokens: int | None = None
    overlong_penalty: float | None = None
    last_token_only: bool = False

    def spread(
        self, rewards: Tensor, ends: Tensor, response_mask: Tensor, *, keep_sum: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Spread rewards of segments over the tokens: (B, T), and each response's total, (B,).

        Args:
            rewards: (B, T), 0 outside the ends.
            ends: (B, T) bool.
            response_mask: (B, T) bool.
            keep_sum: The total is the sum, whatever `segment_total` is.
        """
        spread, at_ends = (
            spread_segments(
                rewards,
                ends,
                response_mask,
                interpolation=how,
                segment_total="sum" if keep_sum else self.segment_total,
                softmin_temperature=self.softmin_temperature,
            )
            for how in (self.interpolation, _AT_END)
        )
        return spread, at_ends.sum(1)


def dense_rewards(
    shares: Sequence[tuple[float, Tensor]],
    response_mask: Tensor,
    terminated: Tensor,
    settings: RewardSettings,
) -> Tensor:
    """Each token's reward before the KL penalty (method §5).

    The shares of all sources are added, divided by the length and clamped together, and responses
    that did not end as they should get their penalty instead.

    Args:
        shares: Of each source its weight, and its reward for each token, (B, T).
        response_mask: (B, T) bool.
        terminated: (B,) bool, whether each response ended by itself.
        settings: How the values become rewards.

    Returns:
        (B, T), at least float32.
    """
    rewards = torch.zeros(response_mask.shape, device=response_mask.device)
    for weight, share in shares:
        rewards = rewards + weight * share
    return replace_penalized(
        _bounded(rewards, response_mask, settings.length_normalize, settings.clip),
        response_mask,
        terminated,
        missing_eos_penalty=settings.missing_eos_penalty,
        max_response_tokens=settings.max_response_tokens,
        overlong_penalty=settings.overlong_penalty,
        last_token_only=settings.last_token_only,
    )


def spread_rewards(
    token_values: Tensor,
    ends: Tensor,
    response_mask: Tensor,
    *,
    normalizer: LocationNormalizer | None = None,
    interpolation: Interpolation = "even",
    segment_total: SegmentTotal = "sum",
    softmin_temperature: float = 0.1,
    length_normalize: bool = False,
    clip: float = 10.0,
) -> Tensor:
    """Turn the reward model's values into a reward for each token (method §5).

    Normalise by location, divide by the number of segments (`mean`), spread inside the segment,
    divide by the response length (`length_normalize`), clamp to ± clip, in this order.

    Args:
        token_values: (B, T), the reward head at every token; only those at ends count.
        ends: (B, T) bool.
        response_mask: (B, T) bool.
        normalizer: By location; None leaves the values as they are.
        interpolation: `even` gives each token of a segment reward / length, `repeat` the whole
            reward, `end` gives it to the last token.
        segment_total: A response's reward is the `sum` of its segments', their `mean`, or their
            `softmin`: the mean with weights softmax(-reward / softmin_temperature).
        softmin_temperature: See there (PURE, 2025).
        length_normalize: Divide by the number of response tokens.
        clip: Largest absolute reward of a token.

    Returns:
        (B, T), at least float32, 0 outside every segment.

    Raises:
        DenserlError: Unknown interpolation or segment_total.
    """
    normal = normalize(at_least_float32(token_values), ends, normalizer)
    rewards = spread_segments(
        normal,
        ends,
        response_mask,
        interpolation=interpolation,
        segment_total=segment_total,
        softmin_temperature=softmin_temperature,
    )
    return _bounded(rewards, response_mask, length_normalize, clip)


def spread_segments(
    rewards: Tensor,
    ends: Tensor,
    response_mask: Tensor,
    *,
    interpolation: Interpolation = "even",
    segment_total: SegmentTotal = "sum",
    softmin_temperature: float = 0.1,
) -> Tensor:
    """Spread the rewards of segments, which stand at their ends, over the segments' tokens.

    Args:
        rewards: (B, T), 0 outside the ends.
        ends: (B, T) bool.
        response_mask: (B, T) bool.
        interpolation: As in `spread_rewards`.
        segment_total: As in `spread_rewards`.
        softmin_temperature: As in `spread_rewards`.

    Returns:
        (B, T).

    Raises:
        DenserlError: Unknown interpolation or segment_total.
    """
    if segment_total == "mean":
        rewards = rewards / ends.sum(1, keepdim=True).clamp(min=1)
    elif segment_total == "softmin":
        least = (-rewards / softmin_temperature).masked_fill(~ends, -torch.inf)
        rewards = rewards * least.softmax(1).nan_to_num()  # a row without segments has no weights
    elif segment_total != "sum":
        raise DenserlError(
            f"unknown segment_total {segment_total!r}", hint="use sum, mean or softmin"
        )
    if interpolation in ("even", "repeat"):
        return _fill_segments(rewards, ends, response_mask, divide=interpolation == "even")
    if interpolation == "end":
        return rewards.masked_fill(~ends, 0)
    raise DenserlError(f"unknown interpolation {interpolation!r}", hint="use even, repeat or end")


def _bounded(rewards: Tensor, response_mask: Tensor, length_normalize: bool, clip: float) -> Tensor:
    """Divide by the length, if asked to, and clamp; in place."""
    if length_normalize:
        rewards.div_(response_mask.sum(1, keepdim=True).clamp(min=1))
    return rewards.clamp_(-clip, clip)


def penalize_kl(
    rewards: Tensor,
    logprobs: Tensor,
    reference_logprobs: Tensor,
    response_mask: Tensor,
    kl_coef: float,
) -> Tensor:
    """Subtract kl_coef * (log π - log π_ref), k1, from every response token's reward (method §5).

    Args:
        rewards: (B, T); masked columns keep theirs.
        logprobs: (B, T), nats, log π of each token.
        reference_logprobs: (B, T), nats, log π_ref.
        response_mask: (B, T) bool.
        kl_coef: Weight of the penalty; a negative one counts as 0.

    Returns:
        (B, T), at least float32.
    """
    log_ratio = (at_least_float32(logprobs) - reference_logprobs).masked_fill(~response_mask, 0)
    return rewards - max(kl_coef, 0.0) * log_ratio


def replace_penalized(
    rewards: Tensor,
    response_mask: Tensor,
    terminated: Tensor,
    *,
    missing_eos_penalty: float | None = None,
    max_response_tokens: int | None = None,
    overlong_penalty: float | None = None,
    last_token_only: bool = False,
) -> Tensor:
    """Give responses that did not end, or ended too late, a penalty instead of rewards (method §5).

    Args:
        rewards: (B, T).
        response_mask: (B, T) bool.
        terminated: (B,) bool, whether each response ended by itself.
        missing_eos_penalty: Reward of responses that did not; None leaves their rewards.
        max_response_tokens: Tokens above which a response gets `overlong_penalty`.
        overlong_penalty: Takes precedence over `missing_eos_penalty`.
        last_token_only: The penalty goes to the last token alone, with 0 elsewhere (bandit),
            instead of to every response token.

    Returns:
        (B, T); masked columns of a penalised row are 0.

    Raises:
        DenserlError: Only one of max_response_tokens and overlong_penalty is given.
    """
    if (max_response_tokens is None) != (overlong_penalty is None):
        raise DenserlError(
            "max_response_tokens and overlong_penalty belong together", hint="set both or neither"
        )
    number = response_mask.cumsum(1)
    length = number[:, -1:]
    paid = response_mask & (number == length) if last_token_only else response_mask
    if missing_eos_penalty is not None:
        rewards = torch.where(terminated[:, None], rewards, paid * missing_eos_penalty)
    if max_response_tokens is not None and overlong_penalty is not None:
        rewards = torch.where(length <= max_response_tokens, rewards, paid * overlong_penalty)
    return rewards


@dataclass
class AdaptiveKL:
    """The weight of the KL penalty, adapted towards a target (Ziegler et al. 2019; method §5).

    Attributes:
        coef: The current weight. It is the whole state: save it, and set it to resume.
        target: Mean per-token KL in nats; None keeps coef as it is.
        horizon: In responses; over one horizon an error of 20 % or more changes coef by about 20 %.
        in_loss: The KL is a term of the policy's loss, not a penalty on the rewards.
    """

    coef: float
    target: float | None = None
    horizon: int = 10_000
    in_loss: bool = False

    @property
    def of_rewards(self) -> float:
        """The weight of the penalty on the rewards."""
        return 0.0 if self.in_loss else self.coef

    @property
    def of_loss(self) -> float:
        """The weight of the term of the policy's loss."""
        return self.coef if self.in_loss else 0.0

    def update(self, kl: float, responses: int) -> None:
        """Adapt the weight after `responses` responses whose mean per-token KL was `kl` nats."""
        if self.target is not None:
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.coef *= 1 + error * responses / self.horizon


def _fill_segments(rewards: Tensor, ends: Tensor, response_mask: Tensor, *, divide: bool) -> Tensor:
    """Copy the reward at each segment's end to its tokens, over its length if `divide`: (B, T)."""
    columns = ends.shape[1]
    # the nearest end at or after each token, as its distance from the right; 0 where none is
    distance = torch.arange(columns, 0, -1, dtype=torch.int32, device=ends.device)
    inside = response_mask.int()
    nearest = (ends * distance).flip(1).cummax(1).values.flip(1).mul_(inside)
    end = (columns - nearest).long()
    rewards = pad(rewards, (0, 1))  # a column of zeros for the tokens of no segment
    if divide:
        lengths = torch.zeros_like(rewards, dtype=torch.int32).scatter_add_(1, end, inside)
        rewards.div_(lengths.clamp_(min=1))
    return rewards.gather(1, end)
