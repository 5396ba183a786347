from __future__ import annotations

import math

import pytest
import torch

from denserl_cli.core.errors import DenserlError
from denserl_cli.core.reward_model.loss import (
    PreferenceObjective,
    preference_loss,
    ranking_loss,
    segment_label_loss,
)
from denserl_cli.core.segmentation import aggregate_segments

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


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def test_every_option_of_the_preference_loss_by_hand():
    chosen, rejected = torch.tensor([1.0, 0.5]), torch.tensor([0.0, 2.0])
    loss = preference_loss(
        *(chosen, rejected, torch.tensor([0.1, 0.2])),
        weight=torch.tensor([2.0, 0.5]),
        temperature=0.5,
        target_margin=0.3,
        label_smoothing=0.1,
        center_rewards=0.01,
    )
    expected = 0.0
    for d, weight, total in ((2 - 0.4, 2.0, 1.0), (-3 - 0.5, 0.5, 2.5)):
        smooth = 0.9 * softplus(-d) + 0.1 * softplus(d)
        expected += (weight * smooth + 0.01 * total**2) / 2
    assert loss.item() == pytest.approx(expected)


def test_the_plain_objective_is_the_preference_loss_to_the_bit():
    scores, margin = torch.randn(2, 50), torch.randn(50)
    margin[7] = math.nan  # a pair without
    plain = preference_loss(*scores, margin.nan_to_num(0.0))
    assert torch.equal(PreferenceObjective().loss(*scores, margin), plain)
    assert torch.equal(PreferenceObjective().loss(*scores, None), preference_loss(*scores))
    ignored = PreferenceObjective(margins="ignore").loss(*scores, margin)
    assert torch.equal(ignored, preference_loss(*scores))
    weighted = PreferenceObjective(margins="weight").loss(*scores, margin)
    by_hand = preference_loss(*scores, weight=margin.nan_to_num(1.0))
    assert torch.equal(weighted, by_hand)


def test_smoothed_labels_have_a_best_difference():
    difference = torch.tensor([math.log(0.9 / 0.1)], requires_grad=True)
    preference_loss(difference, torch.zeros(1), label_smoothing=0.1).backward()
    assert difference.grad.item() == pytest.approx(0, abs=1e-7)


def test_centring_pulls_both_scores_to_0():
    scores = torch.tensor([[2.0], [1.0]], requires_grad=True)
    (preference_loss(*scores, center_rewards=0.1) - preference_loss(*scores)).backward()
    assert scores.grad.flatten().tolist() == pytest.approx([0.6, 0.6])


def test_two_ranked_answers_are_a_pair():
    scores = torch.randn(20, 2, dtype=torch.float64, requires_grad=True)
    ranking = ranking_loss(scores, torch.ones(20, 2, dtype=torch.bool))
    pairs = preference_loss(scores[:, 0], scores[:, 1])
    torch.testing.assert_close(ranking, pairs, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(
        torch.autograd.grad(ranking, scores), torch.autograd.grad(pairs, scores), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_rankings_by_hand():
    scores = torch.tensor([[1.0, 2.0, 0.0], [3.0, 1.0, math.nan], [5.0, math.nan, math.nan]])
    ranked = torch.tensor([[True, True, True], [True, True, False], [True, False, False]])
    scores.requires_grad_()
    loss = ranking_loss(scores, ranked)
    e = math.exp
    three = -math.log(e(1) / (e(1) + e(2) + 1)) - math.log(e(2) / (e(2) + 1))
    assert loss.item() == pytest.approx((three + softplus(-2.0)) / 2)
    loss.backward()
    assert torch.isfinite(scores.grad).all() and not scores.grad[2].any()
    assert ranking_loss(torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool)).item() == 0


def test_labelled_segments_by_hand():
    values = VALUES.clone().requires_grad_()
    labels = torch.tensor([[1, 0, 0, 1], [0, 1, 0, 0]]).float()
    loss = segment_label_loss(values, ENDS, labels)
    expected = (softplus(-1) + softplus(4) + softplus(-8) + softplus(-5)) / 4
    assert loss.item() == pytest.approx(expected)
    loss.backward()
    assert not values.grad[~ENDS].any() and values.grad[ENDS].all()
    assert segment_label_loss(VALUES, ENDS & False, labels).item() == 0
