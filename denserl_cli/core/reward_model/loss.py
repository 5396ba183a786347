"""The losses on the scores of responses, and of segments (method §3)."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

from denserl_cli.core.precision import at_least_float32


def preference_loss(
    chosen_score: Tensor,
    rejected_score: Tensor,
    margin: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    temperature: float = 1.0,
    target_margin: float = 0.0,
    label_smoothing: float = 0.0,
    center_rewards: float = 0.0,
) -> Tensor:
    """Bradley-Terry loss -log σ(d), mean over pairs (method §3).

    d = (chosen - rejected) / temperature - margin - target_margin.

    Args:
        chosen_score: (pairs,).
        rejected_score: (pairs,).
        margin: (pairs,), by how much the chosen score should be higher; None: 0.
        weight: (pairs,), of each pair's loss (scaled Bradley-Terry, arXiv 2410.01257); None: 1.
        temperature: Divides the difference, 1 / β of SimPO (2405.14734) and Q-RM.
        target_margin: By how much d has to exceed 0 in every pair, γ of the two.
        label_smoothing: Share of labels taken to be wrong: so much of -log σ(-d) is in the loss.
        center_rewards: Weight of (chosen + rejected)² beside it, which keeps the scores' mean near
            0 (2312.09244).

    Returns:
        A scalar, at least float32; 0 without pairs.
    """
    chosen = at_least_float32(chosen_score)
    difference = chosen - rejected_score
    if temperature != 1:
        difference = difference / temperature
    if margin is not None:
        difference = difference - margin
    if target_margin:
        difference = difference - target_margin
    loss = -logsigmoid(difference)
    if label_smoothing:
        loss = torch.lerp(loss, -logsigmoid(-difference), label_smoothing)
    if weight is not None:
        loss = loss * weight
    if center_rewards:
        loss = loss + center_rewards * (chosen + rejected_score).square()
    return loss.sum() / max(len(difference), 1)


def ranking_loss(scores: Tensor, ranked: Tensor) -> Tensor:
    """Plackett-Luce loss of ranked answers, mean over the rankings (Luce 1959; Plackett 1975).

    The best answer is chosen among all, the next one among the others, and so on: the sum over k of
    -log softmax(scores[k:])[0]. With two answers it is the Bradley-Terry loss.

    Args:
        scores: (B, K), of the answers to one prompt in a row, the best first.
        ranked: (B, K) bool, which columns hold an answer; they come first.

    Returns:
        A scalar, at least float32; 0 without rankings of two answers or more.
    """
    scores = at_least_float32(scores).masked_fill(~ranked, -torch.inf)
    left = scores.flip(1).logcumsumexp(1).flip(1)  # over an answer and the worse ones
    choices = ranked & (ranked.cumsum(1) < ranked.sum(1, keepdim=True))  # the last is no choice
    surprise = left.masked_fill(~choices, 0) - scores.masked_fill(~choices, 0)
    return surprise.sum() / (ranked.sum(1) > 1).sum().clamp(min=1)


def segment_label_loss(token_values: Tensor, ends: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy of segments that are known to be right or wrong.

    Args:
        token_values: (B, T), the scalar head at every token: the log-odds of right at an end.
        ends: (B, T) bool, of the labelled segments.
        labels: (B, T), 1 at the end of a right segment, 0 of a wrong one, a share in between.

    Returns:
        A scalar, at least float32: the mean over all labelled segments; 0 without any.
    """
    values = at_least_float32(token_values)[ends]
    wanted = labels[ends].to(values.dtype)
    total = binary_cross_entropy_with_logits(values, wanted, reduction="sum")
    return total / ends.sum().clamp(min=1)


class PreferenceObjective(NamedTuple):
    """How a reward model is trained on pairs and rankings (`reward_model.*`).

    Attributes:
        margins: What the margin of a pair is: by how much its chosen score should be higher
            (target), the weight of its loss, which is 1 without one, or nothing (ignore).

    The others are as in `preference_loss`.
    """

    margins: Literal["target", "weight", "ignore"] = "target"
    temperature: float = 1.0
    target_margin: float = 0.0
    label_smoothing: float = 0.0
    center_rewards: float = 0.0

    def loss(self, chosen: Tensor, rejected: Tensor, margin: Tensor | None) -> Tensor:
        """The loss of pairs, a scalar. chosen, rejected, margin: (pairs,), NaN without a margin."""
        target = weight = None
        if margin is not None and self.margins == "target":
            target = margin.nan_to_num(0.0)
        elif margin is not None and self.margins == "weight":
            weight = margin.nan_to_num(1.0)
        return preference_loss(chosen, rejected, target, weight=weight, **self._options)

    def ranking_loss(self, scores: Tensor, ranked: Tensor) -> Tensor:
        """The loss of rankings, which have no margins; arguments as in `ranking_loss`.

        The squared sum of a pair's scores, which `center_rewards` weighs, is that of twice their
        mean: so it is of a ranking.
        """
        loss = ranking_loss(scores if self.temperature == 1 else scores / self.temperature, ranked)
        if self.center_rewards:
            means = at_least_float32(scores).masked_fill(~ranked, 0).sum(1) / ranked.sum(1)
            loss = loss + self.center_rewards * (2 * means).square().mean()
        return loss

    @property
    def _options(self) -> dict[str, float]:
        return {name: value for name, value in self._asdict().items() if name != "margins"}
