"""The updates: the same in any micro-batches, the same as written out, and careful with NaN."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from denserl_cli.core.engine.base import NonFiniteError
from denserl_cli.core.engine.torch_engine import TorchEngine
from denserl_cli.core.ppo.losses import clipped_policy_loss, clipped_value_loss
from denserl_cli.core.ppo.rollout import Rollout
from denserl_cli.core.ppo.update import Updater
from denserl_cli.core.recipe.schema import OptimizerConfig, PPOConfig, RolloutConfig
from tests import tiny

ALL = np.arange(6)


def engine(model: Any, steps: int = 10) -> TorchEngine:
    return TorchEngine(
        model.train(),
        learning_rate=1e-2,
        settings=OptimizerConfig(warmup_ratio=0.0),
        total_steps=steps,
        compute_dtype=torch.float32,
    )


def updater(pad_id: int = 0, **settings: Any) -> Updater:
    defaults = {
        "train_batch_size": 6,
        "micro_batch_size": 6,
        "rollout": RolloutConfig(temperature=0.7),
        "value_clip": 0.25,
    }
    return Updater(
        PPOConfig(**{**defaults, **settings}),
        actor=engine(tiny.causal_lm(0)),
        critic=engine(tiny.scalar_model(1)),
        pad_id=pad_id,
        seed=3,
    )


def numbers(rollout: Rollout) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages and returns."""
    generator = torch.Generator().manual_seed(9)
    shape = rollout.response_mask.shape
    return (
        torch.randn(shape, generator=generator) * rollout.response_mask,
        torch.randn(shape, generator=generator) * rollout.response_mask,
    )


def weights(update: Updater) -> dict[str, torch.Tensor]:
    models = {"actor": update.actor.model, "critic": update.critic.model}
    return {
        f"{name}.{key}": value.clone()
        for name, model in models.items()
        for key, value in model.state_dict().items()
    }


def gradients(update: Updater) -> dict[str, list[torch.Tensor]]:
    """What each engine has accumulated when it steps; the list fills while it works."""
    kept: dict[str, list[torch.Tensor]] = {"actor": [], "critic": []}
    for name in kept:
        trained, found = getattr(update, name), kept[name]
        check = trained.check

        def noting(trained=trained, found=found, check=check) -> None:
            found += [p.grad.clone() for p in trained.parameters if p.grad is not None]
            check()

        trained.check = noting
    return kept


def written_out(update: Updater, rollout: Rollout, reduce: str) -> dict[str, torch.Tensor]:
    """Both losses from full logits, one row at a time, no padding."""
    logprobs, values = torch.zeros(6, 6), torch.zeros(6, 6)
    for row, (prompt, response) in enumerate(zip(rollout.prompts, rollout.responses, strict=True)):
        ids = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))[None]
        before = slice(len(prompt) - 1, -1)
        choices = (update.actor.model(ids).logits[0, before] / 0.7).log_softmax(-1)
        targets = ids[0, len(prompt) :, None]
        states = update.critic.model.model(ids).last_hidden_state[0, before]
        count = len(response)
        logprobs[row, :count] = choices.gather(1, targets)[:, 0]
        values[row, :count] = update.critic.model.score(states)[:, 0]
    advantages, returns = numbers(rollout)
    mask = rollout.response_mask
    policy = clipped_policy_loss(
        logprobs, rollout.logprobs, advantages, mask, clip=0.2, reduce=reduce
    )
    value = clipped_value_loss(values, rollout.values, returns, mask, clip=0.25, reduce=reduce)
    return {"policy_loss": policy.loss, "value_loss": value.loss}


@pytest.mark.parametrize("reduce", ["sequence", "token"])
@pytest.mark.parametrize("micro", [6, 4, 1])
def test_micro_batches_add_up_to_the_losses_as_written(reduce: str, micro: int, rollout: Rollout):
    update = updater(loss_reduce=reduce, micro_batch_size=micro, pad_id=7)
    found = gradients(update)
    expected = written_out(update, rollout, reduce)
    by_hand = {
        "actor": torch.autograd.grad(expected["policy_loss"], update.actor.parameters),
        "critic": torch.autograd.grad(
            expected["value_loss"], update.critic.parameters, allow_unused=True
        ),
    }
    stats = update.step(rollout, *numbers(rollout), ALL, policy_learns=True)
    for name, loss in expected.items():
        torch.testing.assert_close(stats[name], loss.detach(), rtol=1e-5, atol=1e-5)
    for name, gradient in by_hand.items():
        known = [g for g in gradient if g is not None]
        torch.testing.assert_close(found[name], known, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reduce", ["sequence", "token"])
def test_the_micro_batch_size_does_not_change_the_weights(reduce: str, rollout: Rollout):
    whole, parts = updater(loss_reduce=reduce), updater(loss_reduce=reduce, micro_batch_size=2)
    one, other = (update.update(1, rollout, *numbers(rollout)) for update in (whole, parts))
    for name in ("policy_loss", "value_loss", "policy_gradient_norm", "critic_gradient_norm"):
        assert one[name] == pytest.approx(other[name], rel=1e-4, abs=1e-5), name
    for (name, left), right in zip(weights(whole).items(), weights(parts).values(), strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=2e-4, msg=name)


@pytest.mark.parametrize("reduce", ["sequence", "token"])
def test_the_metrics_do_not_depend_on_the_micro_batches(reduce: str, rollout: Rollout):
    advantages, returns = numbers(rollout)
    whole, parts = updater(loss_reduce=reduce), updater(loss_reduce=reduce, micro_batch_size=2)
    one, other = (u.step(rollout, advantages, returns, ALL, True) for u in (whole, parts))
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=1e-4, atol=1e-5, msg=name)


def test_the_critic_warms_up_alone(rollout: Rollout):
    update = updater(critic_warmup=2)
    before = weights(update)
    stats = update.update(2, rollout, *numbers(rollout))
    after = weights(update)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.startswith("critic.") for name in changed)
    assert "policy_loss" not in stats and "value_loss" in stats
    assert update.actor.schedule.last_epoch == 0
    assert "policy_loss" in update.update(3, rollout, *numbers(rollout))
    assert not torch.equal(before["actor.lm_head.weight"], weights(update)["actor.lm_head.weight"])


def test_every_epoch_sees_every_response_once_in_an_order_of_its_own(rollout: Rollout):
    update = updater(train_batch_size=2, micro_batch_size=2, epochs=3)
    seen: list[int] = []
    step = update.step

    def noting(rollout, advantages, returns, rows, policy_learns):
        seen.extend(rows.tolist())
        return step(rollout, advantages, returns, rows, policy_learns)

    update.step = noting
    update.update(1, rollout, *numbers(rollout))
    epochs = [seen[start : start + 6] for start in (0, 6, 12)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(6))] * 3
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert update.actor.schedule.last_epoch == update.critic.schedule.last_epoch == 9
    seen.clear()
    update.update(2, rollout, *numbers(rollout))
    assert seen[:6] not in epochs


def test_the_metrics_are_means_over_the_steps_and_the_rates_of_the_start(rollout: Rollout):
    update = updater(train_batch_size=3, micro_batch_size=3)
    losses: list[float] = []
    step = update.step

    def noting(*words):
        found = step(*words)
        losses.append(found["value_loss"].item())
        return found

    update.step = noting
    rate = update.actor.learning_rate
    stats = update.update(1, rollout, *numbers(rollout))
    assert stats["value_loss"] == pytest.approx(sum(losses) / 2)
    assert stats["policy_learning_rate"] == rate != update.actor.learning_rate
    assert {f"{who}_gradient_norm" for who in ("policy", "critic")} <= stats.keys()
    assert {"policy_clip_fraction", "value_clip_fraction", "policy_approx_kl"} <= stats.keys()


@pytest.mark.parametrize("place", ["advantages", "returns"])
def test_nan_in_either_loss_changes_neither_model(place: str, rollout: Rollout):
    update = updater(micro_batch_size=2)
    before = weights(update)
    given = dict(zip(("advantages", "returns"), numbers(rollout), strict=True))
    given[place][1, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="nan"):
        update.update(1, rollout, **given)
    assert all(torch.equal(value, before[name]) for name, value in weights(update).items())
    assert update.actor.schedule.last_epoch == update.critic.schedule.last_epoch == 0
    update.update(1, rollout, *numbers(rollout))  # nothing of the bad gradients is left
    clean = updater(micro_batch_size=2)
    clean.update(1, rollout, *numbers(rollout))
    assert all(
        torch.equal(*pair)
        for pair in zip(weights(update).values(), weights(clean).values(), strict=True)
    )


def test_a_skipped_step_leaves_the_others_of_its_iteration(rollout: Rollout):
    update = updater(train_batch_size=2, micro_batch_size=2)
    advantages, returns = numbers(rollout)
    advantages[1, 0] = float("nan")
    skipped: list[NonFiniteError] = []

    @contextmanager
    def guarded():
        try:
            yield
        except NonFiniteError as error:
            skipped.append(error)

    stats = update.update(1, rollout, advantages, returns, guarded)
    assert len(skipped) == 1 and update.actor.schedule.last_epoch == 2
    assert np.isfinite(stats["policy_loss"])
    returns[:, 0] = float("nan")
    assert update.update(2, rollout, advantages, returns, guarded).keys() == {
        "policy_learning_rate",
        "critic_learning_rate",
    }
