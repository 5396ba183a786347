"""The clipped updates of policy and critic over one rollout."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from denserl_cli.core.data.batches import SequenceBatch, collate_sequences, micro_batches
from denserl_cli.core.engine.base import step
from denserl_cli.core.models.causal_lm import response_logprobs
from denserl_cli.core.models.scalar_head import token_values
from denserl_cli.core.ppo.losses import LossOutput, clipped_policy_loss, clipped_value_loss
from denserl_cli.core.system.distributed import all_reduce_sum, max_over_ranks, shard_micro_batches

if TYPE_CHECKING:
    from denserl_cli.core.engine.base import Engine
    from denserl_cli.core.ppo.rollout import Rollout
    from denserl_cli.core.recipe.resolved import ResolvedPPO


class Updater:
    """Trains actor and critic on rollouts in train batches, each split by length."""

    def __init__(
        self,
        settings: ResolvedPPO,
        *,
        actor: Engine,
        critic: Engine,
        pad_id: int,
        seed: int,
    ) -> None:
        self.settings, self.actor, self.critic = settings, actor, critic
        self.pad_id, self.seed = pad_id, seed

    def update(
        self,
        iteration: int,
        rollout: Rollout,
        advantages: Tensor,
        returns: Tensor,
        guarded: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> dict[str, float]:
        """Take every optimizer step of one iteration.

        Args:
            iteration: Its number, from 1.
            rollout: With R responses.
            advantages: (R, T).
            returns: (R, T).
            guarded: Makes the context of each step, in which a step raises NonFiniteError before
                either model is changed.

        Returns:
            Mean metrics of the steps.
        """
        settings = self.settings
        rates = {
            "policy_learning_rate": self.actor.learning_rate,
            "critic_learning_rate": self.critic.learning_rate,
        }
        policy_learns = iteration > settings.critic_warmup
        steps = []
        for epoch in range(settings.epochs):
            rng = np.random.default_rng([self.seed, iteration, epoch])
            order = rng.permutation(len(rollout.responses))
            for rows in np.split(order, len(order) // settings.train_batch_size):
                with guarded():
                    steps.append(self.step(rollout, advantages, returns, rows, policy_learns))
        if not steps:
            return rates
        means = {name: torch.stack([s[name] for s in steps]).mean() for name in steps[0]}
        return rates | dict(zip(means, torch.stack(list(means.values())).tolist(), strict=True))

    def step(
        self,
        rollout: Rollout,
        advantages: Tensor,
        returns: Tensor,
        rows: np.ndarray,
        policy_learns: bool,
    ) -> dict[str, Tensor]:
        """One optimizer step on a train batch; micro-batches weigh by their share of it.

        Args:
            rollout: With R responses.
            advantages: (R, T).
            returns: (R, T).
            rows: Numbers of the responses in the train batch.
            policy_learns: False trains the critic alone.

        Returns:
            Metrics of the step by name, 0-d each.
        """
        settings, total = self.settings, dict[str, Tensor]()
        mine = shard_micro_batches(self.parts(rollout, rows))
        for number, (part, counts) in enumerate(mine, 1):
            batch = self.collate(rollout, part)
            mask, last = batch.response_mask, number == len(mine)
            tokens = _share(rollout, part, rows) * counts
            weight = tokens if settings.loss_reduce == "token" else len(part) / len(rows) * counts
            values = self.critic(token_values, batch, before=True)
            value_loss = clipped_value_loss(
                values,
                _window(rollout.values, part, mask),
                _window(returns, part, mask),
                mask,
                clip=settings.value_clip,
                reduce=settings.loss_reduce,
            )
            self.critic.backward(value_loss.loss * weight, last=last)
            _add(total, "value", value_loss, weight, tokens)
            if not policy_learns:
                continue
            logprobs = self.actor(
                response_logprobs,
                batch,
                temperature=settings.rollout.temperature,
                with_entropy=False,
            ).logprobs
            policy_loss = clipped_policy_loss(
                logprobs,
                _window(rollout.logprobs, part, mask),
                _window(advantages, part, mask),
                mask,
                clip=settings.policy_clip,
                reduce=settings.loss_reduce,
            )
            self.actor.backward(policy_loss.loss * weight, last=last)
            _add(total, "policy", policy_loss, weight, tokens)
        _over_ranks(total)
        engines = {"critic": self.critic} | ({"policy": self.actor} if policy_learns else {})
        for name, norm in zip(engines, step(*engines.values()), strict=True):
            total[f"{name}_gradient_norm"] = norm
        return total

    def collate(self, rollout: Rollout, part: np.ndarray) -> SequenceBatch:
        """The prompts and responses of some rows as one batch."""
        return collate_sequences(
            [rollout.prompts[i] for i in part],
            [rollout.responses[i] for i in part],
            self.pad_id,
            rollout.response_mask.device,
        )

    def parts(self, rollout: Rollout, rows: np.ndarray) -> list[np.ndarray]:
        """The rows of a train batch in micro-batches of similar length."""
        lengths = [len(rollout.prompts[i]) + len(rollout.responses[i]) for i in rows]
        return micro_batches(np.array(lengths), rows, self.settings.micro_batch_size)


def _share(rollout: Rollout, part: np.ndarray, rows: np.ndarray) -> float:
    """The share of a train batch's response tokens that a micro-batch has."""
    tokens = [len(response) for response in rollout.responses]
    return sum(tokens[i] for i in part) / sum(tokens[i] for i in rows)


def _add(
    total: dict[str, Tensor], model: str, output: LossOutput, weight: float, tokens: float
) -> None:
    """Add a micro-batch's loss by its weight, and its metrics by its tokens or as a maximum."""
    total[f"{model}_loss"] = total.get(f"{model}_loss", 0) + output.loss.detach() * weight
    for name, value in output.metrics.items():
        metric = f"{model}_{name}"
        if metric.endswith("_max"):
            total[metric] = torch.maximum(total.get(metric, value), value)
        else:
            total[metric] = total.get(metric, 0) + value * tokens


def _over_ranks(total: dict[str, Tensor]) -> None:
    """Reduce the metrics over the processes, in place: sums, or maxima where a name says so."""
    for largest, reduce in ((False, all_reduce_sum), (True, max_over_ranks)):
        names = [name for name in total if name.endswith("_max") is largest]
        if names:
            whole = reduce(torch.stack([total[name].float() for name in names]))
            total.update(zip(names, whole.unbind(), strict=True))


def _window(values: Tensor, part: np.ndarray, like: Tensor) -> Tensor:
    """The rows `part` of a rollout's (R, T) tensor, cut to the width of `like`."""
    return values[torch.from_numpy(part).to(values.device), : like.shape[1]]
