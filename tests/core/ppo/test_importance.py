import math

import pytest
import torch

from denserl_cli.core.ppo.importance import importance_weights, mismatch_metrics
from denserl_cli.core.ppo.losses import clipped_policy_loss

LOGPROBS = torch.tensor([[0.5, 0.25, 0.1], [0.8, 0.3, 9.0]]).log()
BEHAVIOUR = torch.tensor([[0.25, 0.5, 0.02], [0.8, 0.6, 0.1]]).log()
MASK = torch.tensor([[True, True, True], [True, True, False]])


def test_each_token_has_its_own_capped_ratio():
    weights = importance_weights(LOGPROBS, BEHAVIOUR, MASK, level="token", cap=2.0)
    torch.testing.assert_close(weights, torch.tensor([[2.0, 0.5, 2.0], [1.0, 0.5, 0.0]]))


def test_a_sequence_has_the_product_of_its_ratios():
    weights = importance_weights(LOGPROBS, BEHAVIOUR, MASK, level="sequence", cap=10.0)
    torch.testing.assert_close(weights, torch.tensor([[5.0, 5.0, 5.0], [0.5, 0.5, 0.0]]))
    assert importance_weights(LOGPROBS, BEHAVIOUR, MASK, level="none", cap=2.0) is None


def test_metrics_by_hand():
    metrics = mismatch_metrics(LOGPROBS, BEHAVIOUR, MASK, level="token", cap=2.0)
    kl = -(math.log(2) + math.log(0.5) + math.log(5) + 0 + math.log(0.5)) / 5
    assert metrics["mismatch_kl"].item() == pytest.approx(kl)
    assert metrics["importance_mean"].item() == pytest.approx(6 / 5)
    assert metrics["importance_capped"].item() == pytest.approx(2 / 5)
    plain = mismatch_metrics(LOGPROBS, BEHAVIOUR, MASK, level="none", cap=2.0)
    assert set(plain) == {"mismatch_kl"}


def test_equal_distributions_change_nothing():
    weights = importance_weights(LOGPROBS, LOGPROBS, MASK, level="sequence", cap=2.0)
    advantages = torch.tensor([[1.0, -2.0, 0.5], [3.0, 1.0, 7.0]])
    both = [
        clipped_policy_loss(LOGPROBS + 0.1, LOGPROBS, advantages, MASK, clip=0.2, weights=w).loss
        for w in (None, weights)
    ]
    torch.testing.assert_close(*both)


def test_weights_make_the_gradient_of_a_nucleus_that_of_the_policy():
    """Sampled from the nucleus, the weighted gradient is the policy's, but for the tokens outside.

    Expectations are summed up over the whole vocabulary instead of drawn.
    """
    torch.manual_seed(0)
    logits = torch.randn(6, dtype=torch.float64, requires_grad=True)
    advantages = torch.randn(6, dtype=torch.float64)
    policy = logits.log_softmax(0)
    nucleus = policy.detach() >= policy.detach().sort(descending=True).values[3]
    behaviour = policy.detach().exp() * nucleus / (policy.detach().exp() * nucleus).sum()

    def gradient(level):
        rows = behaviour.log()[nucleus][:, None]
        taken = policy[nucleus][:, None]
        mask = torch.ones_like(taken, dtype=torch.bool)
        weights = importance_weights(taken.detach(), rows, mask, level=level, cap=2.0)
        weights = torch.ones_like(rows) if weights is None else weights
        each = torch.stack(
            [
                clipped_policy_loss(
                    taken[i : i + 1],
                    taken[i : i + 1].detach(),
                    advantages[nucleus][i].view(1, 1),
                    mask[i : i + 1],
                    clip=None,
                    weights=weights[i : i + 1],
                ).loss
                for i in range(len(taken))
            ]
        )
        return torch.autograd.grad((behaviour[nucleus] * each).sum(), logits, retain_graph=True)[0]

    inside = -(policy.detach().exp() * advantages * policy)[nucleus].sum()
    wanted = torch.autograd.grad(inside, logits, retain_graph=True)[0]
    torch.testing.assert_close(gradient("token"), wanted)
    assert not torch.allclose(gradient("none"), wanted, atol=1e-3)
