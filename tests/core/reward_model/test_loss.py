from __future__ import annotations

import math

import pytest
import torch

from denserl_cli.core.errors import DenserlError
from denserl_cli.core.reward_model.loss import aggregate_segments, preference_loss

VALUES = torch.tensor([[1.0, 2.0, 4.0, 8.0], [3.0, 5.0, 7.0, 9.0]])
ENDS = torch.tensor([[1, 0, 1, 1], [0, 1, 0, 0]]).bool()


@pytest.mark.parametrize(
    ("how", "scores"), [("mean", [13 / 3, 5.0]), ("sum", [13.0, 5.0]), ("last", [8.0, 5.0])]
)
def test_aggregation_by_hand(how, scores):
    torch.testing.assert_close(aggregate_segments(VALUES, ENDS, how), torch.tensor(scores))


def test_mean_is_the_default():
    assert torch.equal(aggregate_segments(VALUES, ENDS), aggregate_segments(VALUES, ENDS, "mean"))


def test_one_segment_makes_all_aggregations_alike():
    mean, total, last = (
        aggregate_segments(VALUES[1:], ENDS[1:], h) for h in ("mean", "sum", "last")
    )
    assert mean == total == last == 5.0


@pytest.mark.parametrize("how", ["mean", "sum", "last"])
def test_a_row_without_ends_scores_0_and_pulls_at_nothing(how):
    values = VALUES.clone()
    values[1] = math.nan  # a padded row may hold anything
    values.requires_grad_()
    scores = aggregate_segments(values, ENDS & torch.tensor([[True], [False]]), how)
    assert scores[1] == 0
    scores.sum().backward()
    assert not values.grad[1].any()
    assert torch.isfinite(values.grad).all()


def test_bfloat16_values_are_summed_in_float32():
    values = torch.full((1, 1000), 1.0078125, dtype=torch.bfloat16)
    score = aggregate_segments(values, torch.ones(1, 1000, dtype=torch.bool), "sum")
    assert score.dtype == torch.float32
    assert score.item() == pytest.approx(1007.8125)


def test_unknown_aggregation():
    with pytest.raises(DenserlError, match="unknown aggregation 'median'"):
        aggregate_segments(VALUES, ENDS, "median")


def test_preference_loss_by_hand():
    chosen, rejected = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 0.0])
    # -log sigmoid(1) = 0.3132617, -log sigmoid(0) = log 2
    assert preference_loss(chosen, rejected).item() == pytest.approx((0.3132617 + 0.6931472) / 2)
    loss = preference_loss(chosen, rejected, margin=torch.tensor([1.0, 0.0]))
    assert loss.item() == pytest.approx(0.6931472)


def test_preference_loss_of_no_pairs_is_0():
    assert preference_loss(torch.zeros(0), torch.zeros(0)).item() == 0


def test_preference_loss_of_a_hopeless_pair_stays_finite():
    chosen = torch.tensor([-1e4], requires_grad=True)
    loss = preference_loss(chosen, torch.zeros(1))
    loss.backward()
    assert loss.item() == 1e4
    assert chosen.grad.item() == -1.0
