from __future__ import annotations

import math

import pytest
import torch

from denserl_cli.core.errors import DenserlError
from denserl_cli.core.segmentation import calibrate_cutoff, segment_ends, segment_ids

ENTROPY = torch.tensor([[0.1, 3.0, 0.2, 0.3, 4.0, 5.0]])
ALL = torch.ones(1, 6, dtype=torch.bool)


def positions(ends: torch.Tensor) -> list[list[int]]:
    return [row.nonzero()[:, 0].tolist() for row in ends]


def test_each_granularity_on_a_terminated_response():
    # The peak at 4 closes the last segment anyway; the terminator's own (at 5) counts for nothing.
    ends = segment_ends(ENTROPY, ALL, granularity="segment", cutoff=2.0)
    assert positions(ends) == [[1, 4]]
    assert positions(segment_ends(ENTROPY, ALL, granularity="token")) == [[0, 1, 2, 3, 4]]
    assert positions(segment_ends(ENTROPY, ALL, granularity="bandit")) == [[5]]


def test_the_last_token_of_a_cut_response_is_an_ordinary_one():
    cut = torch.tensor([False])
    ends = segment_ends(ENTROPY, ALL, granularity="segment", cutoff=2.0, terminated=cut)
    assert positions(ends) == [[1, 4, 5]]
    ends = segment_ends(ENTROPY, ALL, granularity="token", terminated=cut)
    assert positions(ends) == [[0, 1, 2, 3, 4, 5]]
    ends = segment_ends(ENTROPY, ALL, granularity="bandit", terminated=cut)
    assert positions(ends) == [[5]]


def test_an_entropy_equal_to_the_cutoff_is_no_peak():
    ends = segment_ends(ENTROPY, ALL, granularity="segment", cutoff=3.0)
    assert positions(ends) == [[4]]


@pytest.mark.parametrize("granularity", ["segment", "token", "bandit"])
def test_short_and_empty_rows(granularity):
    lengths = torch.tensor([0, 1, 2])
    mask = torch.arange(3) < lengths[:, None]
    ends = segment_ends(torch.full((3, 3), 9.0), mask, granularity=granularity, cutoff=1.0)
    assert positions(ends) == [[], [0], [1] if granularity == "bandit" else [0]]


@pytest.mark.parametrize("granularity", ["segment", "token", "bandit"])
def test_columns_do_not_matter_only_the_tokens_do(granularity):
    """Left padding, right padding and holes give the segments of the tokens alone."""
    places = torch.tensor([2, 3, 5, 6, 7, 9])
    entropy = torch.full((1, 12), 50.0)
    mask = torch.zeros(1, 12, dtype=torch.bool)
    entropy[:, places], mask[:, places] = ENTROPY, True
    ends = segment_ends(entropy, mask, granularity=granularity, cutoff=2.0)
    alone = segment_ends(ENTROPY, ALL, granularity=granularity, cutoff=2.0)
    assert torch.equal(ends[:, places], alone)
    assert not ends[~mask].any()


def test_rows_of_a_batch_do_not_touch_each_other():
    generator = torch.Generator().manual_seed(0)
    entropy = torch.rand(9, 17, generator=generator) * 4
    mask = torch.arange(17) < torch.randint(0, 18, (9, 1), generator=generator)
    terminated = torch.rand(9, generator=generator) < 0.5
    together = segment_ends(entropy, mask, granularity="segment", cutoff=2.0, terminated=terminated)
    for i in range(9):
        row = slice(i, i + 1)
        alone = segment_ends(
            entropy[row], mask[row], granularity="segment", cutoff=2.0, terminated=terminated[row]
        )
        assert torch.equal(together[row], alone)


def test_wrong_arguments_are_named():
    with pytest.raises(DenserlError, match="unknown granularity 'word'"):
        segment_ends(ENTROPY, ALL, granularity="word")
    for cutoff in (None, math.nan):
        with pytest.raises(DenserlError, match="segment needs a cutoff"):
            segment_ends(ENTROPY, ALL, granularity="segment", cutoff=cutoff)


def test_segment_ids_number_the_tokens_of_each_segment():
    mask = torch.tensor([[1, 1, 1, 1, 1, 0], [0, 1, 1, 0, 1, 0], [0, 0, 0, 0, 0, 0]]).bool()
    ends = torch.tensor([[0, 1, 0, 1, 0, 0], [0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 0, 0]]).bool()
    assert segment_ids(ends, mask).tolist() == [
        [0, 0, 1, 1, -1, -1],
        [-1, 0, 0, -1, 0, -1],
        [-1, -1, -1, -1, -1, -1],
    ]


def mean_length(entropy, mask, cutoff, terminated=None):
    ends = segment_ends(entropy, mask, granularity="segment", cutoff=cutoff, terminated=terminated)
    return float((segment_ids(ends, mask) >= 0).sum() / ends.sum())


def test_calibration_by_hand():
    # Five tokens before the terminator; the first four may end a segment.
    assert calibrate_cutoff(ENTROPY, ALL, 2.5) == pytest.approx(0.3)  # only 3.0 is above: 5/2
    assert calibrate_cutoff(ENTROPY, ALL, 1) == 0.0
    for length in (100, 1e9, 1e300, math.inf):  # never is a segment longer than all
        assert calibrate_cutoff(ENTROPY, ALL, length) == 3.0


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("length", [1, 1.7, 3, 8, 40])
def test_no_cutoff_is_closer_than_the_calibrated_one(length, cut):
    generator = torch.Generator().manual_seed(3)
    entropy = (torch.rand(6, 30, generator=generator) * 40).round() / 10  # many ties
    mask = torch.arange(30) < torch.tensor([0, 1, 2, 12, 25, 30])[:, None]
    terminated = torch.tensor([True, False] * 3) if cut else None
    found = calibrate_cutoff(entropy, mask, length, terminated)
    error = abs(mean_length(entropy, mask, found, terminated) - length)
    for cutoff in torch.linspace(0, 4.2, 85).tolist():
        assert error <= abs(mean_length(entropy, mask, cutoff, terminated) - length) + 1e-5


def test_calibration_refuses_what_it_cannot_do():
    for length in (0.5, math.nan):
        with pytest.raises(DenserlError, match="cannot have"):
            calibrate_cutoff(ENTROPY, ALL, length)
    with pytest.raises(DenserlError, match="no response tokens"):
        calibrate_cutoff(ENTROPY, ~ALL, 2)


def test_a_cutoff_is_not_rounded_to_half_precision():
    entropy = torch.tensor([[2.0, 1.0, 0.5]]).bfloat16()
    mask = torch.ones(1, 3, dtype=torch.bool)
    ends = segment_ends(entropy, mask, granularity="segment", cutoff=1.9999)
    assert ends.tolist() == [[True, True, False]]


@pytest.mark.parametrize("granularity", ["segment", "token", "bandit"])
def test_a_batch_without_columns_has_no_ends(granularity):
    nothing = torch.zeros(2, 0)
    ends = segment_ends(nothing, nothing.bool(), granularity=granularity, cutoff=1.0)
    assert ends.shape == segment_ids(ends, nothing.bool()).shape == (2, 0)
