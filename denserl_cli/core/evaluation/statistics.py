"""What pairs of scores and samples of scores say, in numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from denserl_cli.core.reward_model.metrics import Floats


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
