"""How well a reward model orders pairs: accuracy, calibration, the effect of length."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from denserl_cli.core.reward_model.loss import preference_loss

Metrics = dict[str, Tensor]
"""Metrics of some pairs by their names, all 0-d: means over the pairs."""


def preference_metrics(scores: Tensor, segments: Tensor, margin: Tensor | None) -> Metrics:
    """Loss and metrics of B pairs. scores, segments: (2B,), chosen before rejected sequences."""
    chosen, rejected = scores.chunk(2)
    return {
        "loss": preference_loss(chosen, rejected, margin),
        "accuracy": (chosen > rejected).float().mean(),
        "reward_mean": scores.mean(),
        "reward_square": scores.square().mean(),
        "segments_per_response": segments.float().mean(),
    }


def to_numbers(names: Sequence[str], means: Tensor) -> dict[str, float]:
    """Means as numbers; the mean square becomes a standard deviation."""
    named = dict(zip(names, means.tolist(), strict=True))
    variance = named.pop("reward_square") - named["reward_mean"] ** 2
    return {**named, "reward_std": max(variance, 0.0) ** 0.5}


def is_number(value: object) -> bool:
    """Whether a logged metric is a number, or null where there was none."""
    return value is None or isinstance(value, (int, float))


Floats = NDArray[np.float64]


CALIBRATION_BINS = 10


LENGTH_EDGES = (1, 10, 50, 200)
"""Tokens at which a difference in length enters the next bin, on either side of 0."""


@dataclass(frozen=True)
class Accuracy:
    """How often the chosen response has the higher score; a tie is an error.

    interval: Wilson's, 95 %. margin: mean of chosen - rejected.
    """

    pairs: int
    accuracy: float
    interval: tuple[float, float]
    ties: int
    margin: float


def accuracy(differences: Floats) -> Accuracy:
    """differences: (pairs,), chosen - rejected score, at least one."""
    from scipy.stats import binomtest  # half a second, and training does without

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
    """Pairs with a confidence from low to high: its mean, and how often it was right."""

    low: float
    high: float
    pairs: int
    predicted: float
    observed: float


@dataclass(frozen=True)
class Calibration:
    """error: |predicted - observed|, mean over all pairs. bins: those that are not empty."""

    error: float
    bins: list[CalibrationBin]


def calibration(differences: Floats) -> Calibration:
    """Compare the Bradley-Terry probability of the better-scored response with the data.

    The confidence in a pair is σ(|difference|) in [0.5, 1]: both orders of a pair say the same, so
    nothing depends on which response is written first. A tie has confidence 0.5 and is half right.
    differences: (pairs,), chosen - rejected score.
    """
    confidence = 1 / (1 + np.exp(-np.abs(differences)))
    right = (np.sign(differences) + 1) / 2
    edges = np.linspace(0.5, 1, CALIBRATION_BINS + 1)
    place = np.minimum(np.searchsorted(edges, confidence, side="right") - 1, CALIBRATION_BINS - 1)
    bins = [
        CalibrationBin(
            low=float(edges[k]),
            high=float(edges[k + 1]),
            pairs=int((place == k).sum()),
            predicted=float(confidence[place == k].mean()),
            observed=float(right[place == k].mean()),
        )
        for k in np.unique(place)
    ]
    error = sum(one.pairs * abs(one.predicted - one.observed) for one in bins) / len(differences)
    return Calibration(error, bins)


@dataclass(frozen=True)
class LengthBin:
    """Pairs whose chosen response is shortest … longest tokens longer; None: without limit."""

    shortest: int | None
    longest: int | None
    pairs: int
    accuracy: float
    margin: float


@dataclass(frozen=True)
class LengthEffect:
    """How much a reward model goes by length.

    longer_accuracy: of preferring the longer response on the same pairs; equal lengths are errors.
    correlation: Pearson's, of score and length difference over both orders of each pair; None where
    one of the two does not vary.
    """

    longer_accuracy: float
    equal_length: int
    correlation: float | None
    bins: list[LengthBin]


def length_effect(differences: Floats, longer: NDArray[np.int64]) -> LengthEffect:
    """differences: (pairs,), chosen - rejected score. longer: (pairs,), the same of tokens."""
    edges = [*(-edge + 1 for edge in reversed(LENGTH_EDGES)), *LENGTH_EDGES]
    place = np.searchsorted(edges, longer, side="right")
    scale = math.sqrt(float(np.square(differences).sum()) * float(np.square(longer).sum()))
    return LengthEffect(
        longer_accuracy=float((longer > 0).mean()),
        equal_length=int((longer == 0).sum()),
        correlation=float(differences @ longer) / scale if scale > 0 else None,
        bins=[
            LengthBin(
                shortest=edges[k - 1] if k else None,
                longest=edges[k] - 1 if k < len(edges) else None,
                pairs=int((place == k).sum()),
                accuracy=float((differences[place == k] > 0).mean()),
                margin=float(differences[place == k].mean()),
            )
            for k in np.unique(place)
        ],
    )
