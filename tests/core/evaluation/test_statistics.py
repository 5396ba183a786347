"""The figures of evaluations against numbers computed by hand and by brute force."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
from scipy.stats import pearsonr

from denserl_cli.core.evaluation.statistics import (
    best_of,
    best_of_kl,
    equivalent_n,
    paired_difference,
)
from denserl_cli.core.reward_model.metrics import accuracy, calibration, length_effect


def test_accuracy_with_a_tie():
    found = accuracy(np.array([1.0, 2.0, 0.0, -1.0]))
    assert (found.pairs, found.accuracy, found.ties, found.margin) == (4, 0.5, 1, 0.5)
    # Wilson: (p + z²/2n ± z sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n) with p = 1/2, n = 4
    z = 1.959963984540054
    half = z * math.sqrt(1 / 16 + z**2 / 64) / (1 + z**2 / 4)
    assert found.interval == pytest.approx((0.5 - half, 0.5 + half))


@pytest.mark.parametrize("sign", [1, -1])
def test_one_pair_has_an_interval_within_0_and_1(sign: int):
    low, high = accuracy(np.array([1.0 * sign])).interval
    assert 0 <= low < high <= 1


def test_calibration_by_hand():
    log3 = math.log(3)  # σ(log 3) = 0.75
    found = calibration(np.array([log3, log3, -log3, log3, 0.0]))
    tied, sure = found.bins
    assert (tied.pairs, tied.predicted, tied.observed) == (1, 0.5, 0.5)
    assert sure.pairs == 4 and sure.low <= 0.75 < sure.high
    assert (sure.predicted, sure.observed) == pytest.approx((0.75, 0.75))
    assert found.error == pytest.approx(0)


def test_calibration_error_of_confident_nonsense():
    found = calibration(np.array([100.0, -100.0]))
    (only,) = found.bins
    assert (only.high, only.predicted, only.observed, found.error) == (1, 1, 0.5, 0.5)


def test_a_calibrated_model_has_a_small_error():
    rng = np.random.default_rng(0)
    gaps = rng.normal(scale=2, size=40_000)
    preferred = rng.random(len(gaps)) < 1 / (1 + np.exp(-gaps))
    differences = np.where(preferred, gaps, -gaps)
    assert calibration(differences).error < 0.01
    assert calibration(3 * differences).error > 0.05


def test_length_by_hand():
    longer = np.array([0, 5, -5, 300, -12])
    found = length_effect(np.array([1.0, 1.0, -1.0, 1.0, -1.0]), longer)
    assert (found.longer_accuracy, found.equal_length) == (0.4, 1)
    spans = [(one.shortest, one.longest, one.pairs, one.accuracy) for one in found.bins]
    assert spans == [
        (-49, -10, 1, 0.0),
        (-9, -1, 1, 0.0),
        (0, 0, 1, 1.0),
        (1, 9, 1, 1.0),
        (200, None, 1, 1.0),
    ]


def test_bins_of_length_are_symmetric_and_whole():
    longer = np.arange(-400, 401)
    found = length_effect(np.ones(len(longer)), longer).bins
    assert sum(one.pairs for one in found) == len(longer)
    spans = [(one.shortest, one.longest) for one in found]
    mirrored = [tuple(None if end is None else -end for end in (b, a)) for a, b in reversed(spans)]
    assert spans == mirrored and spans[0] == (None, -200)


def test_the_correlation_does_not_depend_on_which_response_comes_first():
    rng = np.random.default_rng(1)
    differences, longer = rng.normal(size=50), rng.integers(-20, 20, size=50)
    flip = rng.choice([-1, 1], size=50)
    found = length_effect(differences, longer).correlation
    assert found == pytest.approx(length_effect(flip * differences, flip * longer).correlation)
    both = [np.concatenate([values, -values]) for values in (differences, longer)]
    assert found == pytest.approx(pearsonr(*both).statistic)
    assert length_effect(longer * 0.5, longer).correlation == pytest.approx(1)
    assert length_effect(differences, longer * 0).correlation is None


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_best_of_is_the_mean_over_all_subsets(k: int):
    rng = np.random.default_rng(2)
    scores, values = rng.normal(size=(4, 5)), rng.normal(size=(4, 5))
    chosen = [
        (row, max(subset, key=lambda i: scores[row, i]))
        for row in range(4)
        for subset in combinations(range(5), k)
    ]
    assert best_of(k, scores) == pytest.approx(np.mean([scores[place] for place in chosen]))
    expected = np.mean([values[place] for place in chosen])
    assert best_of(k, scores, values) == pytest.approx(expected)


def test_best_of_one_is_the_mean_and_of_all_the_maximum():
    scores = np.array([[1.0, 3.0], [5.0, 2.0]])
    assert (best_of(1, scores), best_of(2, scores)) == (2.75, 4.0)


def test_the_kl_of_best_of_n():
    assert best_of_kl(1) == 0
    assert best_of_kl(4) == pytest.approx(math.log(4) - 0.75)


def test_the_equivalent_n():
    curve = [1.0, 2.0, 4.0]
    assert [equivalent_n(curve, score) for score in (1.0, 1.5, 3.0, 4.0)] == [1, 1.5, 2.5, 3]
    assert equivalent_n(curve, 0.9) is None and equivalent_n(curve, 4.1) is None
    assert equivalent_n([0.1 + 0.2], 0.3) == 1  # the same but for rounding


def test_paired_differences():
    first, second = np.array([2.0, 3.0, 4.0]), np.array([1.0, 1.0, 1.0])
    found = paired_difference(first, second)
    assert found.mean == 2 and found.interval is not None
    half = 4.302652729911275 / math.sqrt(3)  # t with 2 degrees of freedom, s = 1
    assert found.interval == pytest.approx((2 - half, 2 + half))
    assert paired_difference(first[:1], second[:1]).interval is None
