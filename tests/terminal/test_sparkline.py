import math
from itertools import pairwise

import pytest

from denserl_cli.terminal.sparkline import Curve, binned, sparkline

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ([], ""),
        ([2.0], "▁"),
        ([3.0, 3.0], "▁▁"),
        ([0, 1, 2, 3, 4, 5, 6, 7], "▁▂▃▄▅▆▇█"),
        ([-1.0, NAN, 1.0, INF, -INF], "▁×█××"),
        ([NAN, NAN], "××"),
    ],
)
def test_a_sparkline_spans_the_finite_values(values: list[float], line: str):
    assert sparkline(values) == line


def test_bins_are_means_of_neighbours_and_no_value_is_lost():
    assert binned([1, 3, 5, 7], 2) == [2, 6]
    assert binned([1, 2], 5) == [1, 2]
    assert binned([1, NAN, 4, INF], 2) == [1, 4]
    odd = binned([float(i) for i in range(10)], 3)
    assert odd == [1.0, 4.0, 7.5]


def test_a_curve_of_any_length_stays_small_and_keeps_its_course():
    curve = Curve()
    for step in range(10_000):
        curve.add(float(step))
        assert len(curve.points) <= 512
    points = curve.points
    assert curve.latest == 9999.0
    assert len(points) > 250 and points == sorted(points)
    steps_each = points[1] - points[0]
    assert points[0] == (steps_each - 1) / 2  # the mean of 0, 1 … steps_each - 1
    assert all(b - a == steps_each for a, b in pairwise(points[:-1]))


def test_a_curve_goes_on_after_a_value_that_is_none():
    curve = Curve()
    for value in (1.0, NAN, 2.0):
        curve.add(value)
    assert sparkline(curve.points) == "▁×█"
