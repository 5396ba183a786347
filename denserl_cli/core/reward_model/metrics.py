"""Metrics of a reward model on preference pairs and labelled steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from denserl_cli.core.data.sequences import ranking_table
from denserl_cli.core.reward_model.loss import PreferenceObjective, segment_label_loss

Metrics = dict[str, Tensor]
"""Metrics by name, 0-d each: means over the pairs and rankings, or the steps."""
Floats = NDArray[np.float64]


def preference_metrics(
    scores: Tensor,
    segments: Tensor,
    margin: Tensor | None,
    objective: PreferenceObjective,
    others: np.ndarray,
) -> Metrics:
    """Loss and metrics of B pairs and rankings.

    Args:
        scores: (M,), of all their responses in the order of `Sequences`.
        segments: (M,), numbers of segments, in the same order.
        margin: (B,), of each pair, NaN where it has none; None where no pair has one.
        objective: What the loss is.
        others: (B,), how many answers beside best and worst each has.
    """
    if others.any():
        return _ranking_metrics(scores, segments, margin, objective, others)
    chosen, rejected = scores.chunk(2)
    return {
        "loss": objective.loss(chosen, rejected, margin),
        "accuracy": (chosen > rejected).float().mean(),
        "reward_mean": scores.mean(),
        "reward_square": scores.square().mean(),
        "segments_per_response": segments.float().mean(),
    }


def _ranking_metrics(
    scores: Tensor,
    segments: Tensor,
    margin: Tensor | None,
    objective: PreferenceObjective,
    others: np.ndarray,
) -> Metrics:
    """`preference_metrics` where there are rankings of three or more: each row counts alike.

    Accuracy is the share of a ranking's pairs that the scores order rightly.
    """
    device, rows = scores.device, len(others)
    pairs = torch.from_numpy(np.flatnonzero(others == 0)).to(device)
    places = torch.from_numpy(ranking_table(others)[others > 0]).to(device)
    ranked = places >= 0
    answers, counts = scores[places.clamp(min=0)], ranked.sum(1)
    right = (answers[:, :, None] > answers[:, None, :]) & ranked[:, :, None] & ranked[:, None, :]
    shares = right.triu(1).sum((1, 2)) / (counts * (counts - 1) / 2)
    chosen, rejected = scores[:rows][pairs], scores[rows : 2 * rows][pairs]
    loss = objective.loss(chosen, rejected, None if margin is None else margin[pairs])
    of_rankings = objective.ranking_loss(answers, ranked)

    def mean(values: Tensor) -> Tensor:
        """Of the means of each row. values: (M,), of all responses."""
        own = values[places.clamp(min=0)].masked_fill(~ranked, 0).sum(1) / counts
        both = torch.stack([values[:rows][pairs], values[rows : 2 * rows][pairs]]).mean(0)
        return torch.cat([both, own]).mean()

    return {
        "loss": (loss * len(pairs) + of_rankings * len(places)) / rows,
        "accuracy": torch.cat([(chosen > rejected).float(), shares]).mean(),
        "reward_mean": mean(scores),
        "reward_square": mean(scores.square()),
        "segments_per_response": mean(segments.float()),
    }


def step_metrics(values: Tensor, labels: Tensor) -> Metrics:
    """Loss and metrics of N labelled steps.

    Args:
        values: (N,), the scalar head at their last tokens: the log-odds of right.
        labels: (N,), 1 for right, 0 for wrong, a share in between.
    """
    ends = torch.ones_like(values, dtype=torch.bool)[None]
    return {
        "loss": segment_label_loss(values[None], ends, labels[None]),
        "accuracy": ((values > 0) == (labels > 0.5)).float().mean(),
        "right_steps": (labels > 0.5).float().mean(),
        "reward_mean": values.mean(),
        "reward_square": values.square().mean(),
    }


def first_wrong_accuracy(
    values: Floats, labels: Floats, counts: NDArray[np.int64]
) -> dict[str, float | None]:
    """How well the first wrong step of each response is found (ProcessBench, arXiv 2412.06559).

    Args:
        values: (N,), of all steps, response by response; a step is taken for wrong at 0 or below.
        labels: (N,), as in `step_metrics`.
        counts: (R,), steps of each response.

    Returns:
        `first_wrong_accuracy`: share of the responses with a wrong step whose first one is found.
        `all_right_accuracy`: share of the others in which no step is taken for wrong. None where
        there are no such responses.
    """
    starts = np.cumsum(counts) - counts
    place = np.arange(len(values)) - np.repeat(starts, counts)

    def first(wrong: NDArray[np.bool_]) -> NDArray[np.int64]:
        """The place of each response's first wrong step, or one that none has."""
        return np.minimum.reduceat(np.where(wrong, place, len(values)), starts)

    wanted = first(labels <= 0.5)
    found, has_wrong = first(values <= 0) == wanted, wanted < len(values)
    return {
        "first_wrong_accuracy": float(found[has_wrong].mean()) if has_wrong.any() else None,
        "all_right_accuracy": float(found[~has_wrong].mean()) if (~has_wrong).any() else None,
    }


def to_numbers(names: Sequence[str], means: Tensor) -> dict[str, float]:
    """Means as numbers by name; `reward_square` becomes `reward_std`."""
    named = dict(zip(names, means.tolist(), strict=True))
    variance = named.pop("reward_square") - named["reward_mean"] ** 2
    return {**named, "reward_std": max(variance, 0.0) ** 0.5}


def is_number(value: object) -> bool:
    """Whether a logged metric is a single number, or null in place of one."""
    return value is None or isinstance(value, (int, float))


CALIBRATION_BINS = 10


LENGTH_EDGES = (1, 10, 50, 200)
"""Tokens at which a difference in length enters the next bin, on either side of 0."""


@dataclass(frozen=True)
class Accuracy:
    """How often the chosen response has the higher score; a tie counts as wrong.

    interval: Wilson's, 95 %. margin: mean of chosen - rejected.
    """

    pairs: int
    accuracy: float
    interval: tuple[float, float]
    ties: int
    margin: float


def accuracy(differences: Floats) -> Accuracy:
    """The accuracy on at least one pair. differences: (pairs,), chosen - rejected score."""
    from scipy.stats import binomtest  # its import takes half a second, training does not need it

    right, count = int((differences > 0).sum()), len(differences)
    interval = binomtest(right, count).proportion_ci(0.95, method="wilson")
    return Accuracy(
        pairs=count,
        accuracy=right / count,
        interval=(float(interval.low), float(interval.high)),
        ties=int((differences == 0).sum()),
        margin=float(differences.mean()),
    )


@dataclass(frozen=True)
class CalibrationBin:
    """Pairs with a confidence from low to high: its mean, and the share that it was right on."""

    low: float
    high: float
    pairs: int
    predicted: float
    observed: float


@dataclass(frozen=True)
class Calibration:
    """How far the confidence of a reward model can be trusted.

    error: |predicted - observed|, mean over all pairs. bins: those that are not empty.
    """

    error: float
    bins: list[CalibrationBin]


def calibration(differences: Floats) -> Calibration:
    """Compare the Bradley-Terry probability of the better-scored response with the data.

    The confidence in a pair is σ(|difference|) in [0.5, 1], so it does not depend on which response
    is written first. A tie has confidence 0.5 and is half right.
    differences: (pairs,), chosen - rejected score.
    """
    confidence = 1 / (1 + np.exp(-np.abs(differences)))
    right = (np.sign(differences) + 1) / 2
    edges = np.linspace(0.5, 1, CALIBRATION_BINS + 1)
    index = np.minimum(np.searchsorted(edges, confidence, side="right") - 1, CALIBRATION_BINS - 1)
    bins = [
        CalibrationBin(
            low=float(edges[k]),
            high=float(edges[k + 1]),
            pairs=int((index == k).sum()),
            predicted=float(confidence[index == k].mean()),
            observed=float(right[index == k].mean()),
        )
        for k in np.unique(index)
    ]
    error = sum(one.pairs * abs(one.predicted - one.observed) for one in bins) / len(differences)
    return Calibration(error, bins)


@dataclass(frozen=True)
class LengthBin:
    """Pairs whose chosen response is `shortest` to `longest` tokens longer; None: without limit."""

    shortest: int | None
    longest: int | None
    pairs: int
    accuracy: float
    margin: float


@dataclass(frozen=True)
class LengthEffect:
    """How much a reward model's scores depend on length.

    Attributes:
        longer_accuracy: Of preferring the longer response on the same pairs; equal lengths count as
            wrong.
        equal_length: Pairs whose responses are of equal length.
        correlation: Pearson's, of the differences in score and in length over both orders of each
            pair; None where one of the two does not vary.
        bins: Accuracy by difference in length; those that are not empty.
    """

    longer_accuracy: float
    equal_length: int
    correlation: float | None
    bins: list[LengthBin]


def length_effect(differences: Floats, longer: NDArray[np.int64]) -> LengthEffect:
    """The effect of length on the order of pairs.

    Args:
        differences: (pairs,), chosen - rejected score.
        longer: (pairs,), chosen - rejected length in tokens.
    """
    edges = [*(-edge + 1 for edge in reversed(LENGTH_EDGES)), *LENGTH_EDGES]
    index = np.searchsorted(edges, longer, side="right")
    scale = math.sqrt(float(np.square(differences).sum()) * float(np.square(longer).sum()))
    return LengthEffect(
        longer_accuracy=float((longer > 0).mean()),
        equal_length=int((longer == 0).sum()),
        correlation=float(differences @ longer) / scale if scale > 0 else None,
        bins=[
            LengthBin(
                shortest=edges[k - 1] if k else None,
                longest=edges[k] - 1 if k < len(edges) else None,
                pairs=int((index == k).sum()),
                accuracy=float((differences[index == k] > 0).mean()),
                margin=float(differences[index == k].mean()),
            )
            for k in np.unique(index)
        ],
    )
