from __future__ import annotations

import math

import pytest
import torch

from denserl_cli.core.errors import DenserlError
from denserl_cli.core.ppo.losses import (
    clipped_policy_loss,
    clipped_value_loss,
    kl_loss,
    masked_mean,
)

MASK = torch.tensor([[True, True, False], [True, False, False], [False, False, False]])


def test_masked_mean_by_hand():
    values = torch.tensor([[1.0, 3.0, math.nan], [5.0, math.nan, 0.0], [7.0, 7.0, 7.0]])
    assert masked_mean(values, MASK, "sequence").item() == 3.5  # rows 2 and 5; row 3 is empty
    assert masked_mean(values, MASK, "token").item() == 3.0
    with pytest.raises(DenserlError, match="unknown reduce 'sum'"):
        masked_mean(values, MASK, "sum")


def policy(logprobs, old, advantages, mask=None, **settings):
    logprobs = torch.tensor([logprobs], requires_grad=True)
    mask = torch.ones_like(logprobs, dtype=torch.bool) if mask is None else mask
    output = clipped_policy_loss(
        logprobs, torch.tensor([old]), torch.tensor([advantages]), mask, clip=0.2, **settings
    )
    output.loss.backward()
    return output, logprobs.grad[0].tolist()


def test_policy_loss_by_hand():
    up, down = math.log(1.5), math.log(0.5)
    # A > 0 is clipped above 1.2, A < 0 below 0.8; the pessimistic side is never clipped.
    output, gradient = policy([up, up, down, down], [0.0] * 4, [1.0, -1.0, 1.0, -1.0])
    assert output.loss.item() == pytest.approx(-(1.2 - 1.5 + 0.5 - 0.8) / 4)
    assert gradient == pytest.approx([0, 1.5 / 4, -0.5 / 4, 0])


def test_policy_metrics_by_hand():
    output, _ = policy([math.log(1.5), 0.0, 0.0, 0.0], [0.0] * 4, [1.0] * 4)
    metrics = output.metrics
    assert metrics["clip_fraction"].item() == 0.25
    assert metrics["approx_kl"].item() == pytest.approx((0.5 - math.log(1.5)) / 4)
    assert metrics["ratio_max"].item() == pytest.approx(1.5)
    assert not any(value.requires_grad or value.ndim for value in metrics.values())


def value(values, old, returns, mask=None):
    values = torch.tensor([values], requires_grad=True)
    mask = torch.ones_like(values, dtype=torch.bool) if mask is None else mask
    output = clipped_value_loss(
        values, torch.tensor([old]), torch.tensor([returns]), mask, clip=0.5
    )
    output.loss.backward()
    return output, values.grad[0].tolist()


def test_value_loss_by_hand():
    # Token 1 moved 1.0 towards its return: the kept-near 0.5 has the larger error, no gradient.
    # Token 2 moved 1.0 away: its own error is larger. Token 3 moved within the range.
    output, gradient = value([1.0, 1.0, 0.25], [0.0, 0.0, 0.0], [1.0, -1.0, 1.0])
    assert output.loss.item() == pytest.approx(0.5 * (0.25 + 4 + 0.5625) / 3)
    assert gradient == pytest.approx([0, 2 / 3, -0.75 / 3])
    assert output.metrics["clip_fraction"].item() == pytest.approx(2 / 3)


def test_masked_columns_may_hold_anything():
    mask = torch.tensor([[True, False, False]])
    bad = [math.nan, math.inf]
    output, gradient = policy([-1.0, *bad], [-1.0, 0.0, -math.inf], [2.0, *bad], mask)
    assert output.loss.item() == -2
    assert gradient == [-2, 0, 0]
    assert output.metrics["ratio_max"].item() == 1
    output, gradient = value([1.0, *bad], [1.0, *bad], [3.0, *bad], mask)
    assert output.loss.item() == 2
    assert gradient == [-2, 0, 0]


@pytest.mark.parametrize("reduce", ["sequence", "token"])
def test_nothing_counts_nothing_pulls(reduce):
    empty = torch.zeros(1, 2, dtype=torch.bool)
    output, gradient = policy([1.0, 2.0], [0.0, 0.0], [1.0, 1.0], empty, reduce=reduce)
    assert output.loss.item() == 0
    assert gradient == [0, 0]
    assert all(torch.isfinite(metric) for metric in output.metrics.values())
    output, gradient = value([1.0, 2.0], [0.0, 0.0], [1.0, 1.0], empty)
    assert output.loss.item() == 0
    assert gradient == [0, 0]


@pytest.mark.parametrize("reduce", ["sequence", "token"])
def test_micro_batches_weighted_by_their_share_make_the_batch(reduce):
    generator = torch.Generator().manual_seed(2)
    tensors = [torch.randn(6, 5, generator=generator) for _ in range(3)]
    mask = torch.arange(5) < torch.tensor([0, 1, 5, 3, 0, 4])[:, None]
    whole = clipped_policy_loss(*tensors, mask, clip=0.2, reduce=reduce).loss
    count = mask.any(1).sum() if reduce == "sequence" else mask.sum()
    parts = torch.zeros(())
    for rows in (slice(0, 2), slice(2, 3), slice(3, 6)):
        part = mask[rows]
        share = (part.any(1).sum() if reduce == "sequence" else part.sum()) / count
        loss = clipped_policy_loss(*(t[rows] for t in tensors), part, clip=0.2, reduce=reduce).loss
        parts = parts + share * loss
    torch.testing.assert_close(parts, whole)


@pytest.mark.parametrize("old", [-100.0, -math.inf])
def test_a_ratio_that_overflows_has_the_gradient_of_a_clipped_one(old):
    output, gradient = policy([0.0, 0.0], [old, 0.0], [1.0, 1.0])
    assert output.loss.item() == pytest.approx(-1.1) and gradient == [0, -0.5]
    output, gradient = policy([0.0, 0.0], [old, 0.0], [0.0, 1.0])
    assert output.loss.item() == -0.5 and gradient == [0, -0.5]


def test_masked_columns_have_no_ratio():
    mask = torch.tensor([[True, False]])
    output, _ = policy([-2.0, 0.0], [-1.0, 0.0], [1.0, 1.0], mask)
    assert output.metrics["ratio_max"].item() == pytest.approx(math.exp(-1))


def test_half_precision_is_summed_in_float32():
    mask = torch.ones(2, 1000, dtype=torch.bool)
    zeros, twelve = torch.zeros(2, 1000).half(), torch.full((2, 1000), 12.0).half()
    for reduce in ("sequence", "token"):
        output = clipped_value_loss(zeros, zeros, twelve, mask, clip=0.25, reduce=reduce)
        assert output.loss.item() == 72
    new, old, advantages = (torch.randn(2, 1000).bfloat16() for _ in range(3))
    ours = clipped_policy_loss(new, old, advantages, mask, clip=0.2).loss
    plain = clipped_policy_loss(new.float(), old.float(), advantages.float(), mask, clip=0.2).loss
    assert ours == plain


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_a_batch_without_tokens_costs_nothing(shape):
    nothing = torch.zeros(shape, requires_grad=True)
    policy_loss = clipped_policy_loss(nothing, nothing, nothing, nothing.bool(), clip=0.2)
    value_loss = clipped_value_loss(nothing, nothing, nothing, nothing.bool(), clip=0.2)
    assert policy_loss.loss == value_loss.loss == policy_loss.metrics["ratio_max"] == 0


def test_a_constant_length_weighs_every_token_alike():
    values = torch.tensor([[1.0, 3.0, math.nan], [5.0, math.nan, 0.0], [7.0, 7.0, 7.0]])
    assert masked_mean(values, MASK, "constant", 10).item() == pytest.approx((0.4 + 0.5) / 2)
    with pytest.raises(DenserlError, match="no length"):
        masked_mean(values, MASK, "constant")


def test_the_clip_range_above_may_be_another_than_below():
    up, down = math.log(1.5), math.log(0.5)
    output, gradient = policy([up, down], [0.0] * 2, [1.0, -1.0], clip_high=0.28)
    assert output.loss.item() == pytest.approx(-(1.28 - 0.8) / 2)
    assert gradient == [0, 0]
    inside, _ = policy([math.log(1.25), 0.0], [0.0] * 2, [1.0, 1.0], clip_high=0.28)
    assert inside.metrics["clip_fraction"].item() == 0
    same, _ = policy([up, down], [0.0] * 2, [1.0, -1.0], clip_high=0.2)
    assert torch.equal(same.loss, policy([up, down], [0.0] * 2, [1.0, -1.0])[0].loss)


def test_the_dual_clip_bounds_what_a_bad_token_costs():
    far = math.log(5.0)
    output, gradient = policy([far, far, 0.0], [0.0] * 3, [-1.0, 1.0, -1.0], dual_clip=3.0)
    assert output.loss.item() == pytest.approx(-(-3.0 + 1.2 - 1.0) / 3)
    assert gradient == pytest.approx([0, 0, 1 / 3])


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_kl_losses_by_hand(estimator: str):
    logprobs = torch.tensor([[-1.0, -2.0, math.nan]], requires_grad=True)
    reference = torch.tensor([[-1.5, -1.0, 9.0]])
    loss = kl_loss(logprobs, reference, MASK[:1], estimator=estimator)
    loss.backward()
    terms = {
        "k2": ([0.125, 0.5], [0.5, -1.0]),
        "k3": ([math.exp(-0.5) - 0.5, math.e - 2], [1 - math.exp(-0.5), 1 - math.e]),
    }[estimator]
    assert loss.item() == pytest.approx(sum(terms[0]) / 2)
    assert logprobs.grad[0].tolist() == pytest.approx([terms[1][0] / 2, terms[1][1] / 2, 0.0])
    same = kl_loss(reference[:, :2], reference[:, :2], MASK[:1, :2], estimator=estimator)
    assert same.item() == 0
    with pytest.raises(DenserlError, match="unknown estimator 'k1'"):
        kl_loss(reference, reference, MASK[:1], estimator="k1")
