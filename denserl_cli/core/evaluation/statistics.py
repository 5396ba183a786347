"""What pairs of scores and samples of scores say, in numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

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


def best_of(k: int, scores: Floats, values: Floats | None = None) -> float:
    """Expected value of the best-scored of k samples, mean over prompts; unbiased for k <= N.

    Sample i of N in ascending order of score is the best of C(i-1, k-1) of the C(N, k) subsets.
    scores: (prompts, N). values: of the same shape, what is averaged; None: the scores themselves.
    """
    values = scores if values is None else values
    ordered = np.take_along_axis(values, np.argsort(scores, axis=1, kind="stable"), axis=1)
    count = scores.shape[1]
    shares = [math.comb(i, k - 1) / math.comb(count, k) for i in range(count)]
    return float((ordered @ np.array(shares)).mean())


def best_of_kl(k: int) -> float:
    """Upper bound, in nats, of the KL between best-of-k and the policy that is sampled."""
    return math.log(k) - (k - 1) / k


def equivalent_n(curve: Sequence[float], score: float) -> float | None:
    """The k, between whole ones by interpolation, at which best-of-k has this score.

    curve: best-of-1 … best-of-N. None for a score outside the curve.
    """
    slack = 1e-9 * max(abs(score), 1.0)
    if not curve[0] - slack <= score <= curve[-1] + slack:
        return None
    return float(np.interp(score, curve, np.arange(1, len(curve) + 1)))


@dataclass(frozen=True)
class Difference:
    """A paired difference and its 95 % interval over prompts; None with a single prompt."""

    mean: float
    interval: tuple[float, float] | None


def paired_difference(first: Floats, second: Floats) -> Difference:
    """Subtract second from first, (prompts,) each; Student's t."""
    from scipy.stats import t

    differences = first - second
    mean, count = float(differences.mean()), len(differences)
    if count < 2:
        return Difference(mean, None)
    half = float(t.ppf(0.975, count - 1) * differences.std(ddof=1)) / math.sqrt(count)
    return Difference(mean, (mean - half, mean + half))
