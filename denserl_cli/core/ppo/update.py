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
    from denserl_cli.core.recipe.schema import PPOConfig


class Updater:
    """Trains actor and critic on rollouts in train batches, each split by length."""

    def __init__(
        self,
        settings: PPOConfig,
        *,
        actor: Engine,
        critic: Engine,
        pad_id: int,
        seed: int,
    ) -> None:
        self.settings, self.actor, self.critic = settings, actor, critic
        self.pad_id, self.seed = pad_id, seed

    def __call__(
        self,
        iteration: int,
        rollout: Rollout,
        advantages: Tensor,
        returns: Tensor,
        guarded: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> dict[str, float]:
        """Take every optimizer step of one iteration; returns mean figures of the steps.

        advantages, returns: (R, T). guarded: makes the context of each step, which raises
        NonFiniteError before either model is changed.
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
        """One optimizer step on the train batch `rows`; micro-batches weigh by their share."""
        total: dict[str, Tensor] = {}
        mine = shard_micro_batches(self.parts(rollout, rows))
        for turn, (part, counts) in enumerate(mine, 1):
            batch = self.collate(rollout, part)
            tokens = _share(rollout, part, rows) * counts
            weight = tokens if self.settings.loss_reduce == "token" else len(part) / len(rows)
            weight, last = weight * counts, turn == len(mine)
            outputs = {"value": self.value_loss(batch, rollout, returns, part)}
            self.critic.backward(outputs["value"].loss * weight, last=last)
            if policy_learns:
                outputs["policy"] = self.policy_loss(batch, rollout, advantages, part)
                self.actor.backward(outputs["policy"].loss * weight, last=last)
            for name, output in outputs.items():
                loss = output.loss.detach() * weight
                total[f"{name}_loss"] = total.get(f"{name}_loss", 0) + loss
                for figure, value in output.metrics.items():
                    _gather(total, f"{name}_{figure}", value, tokens)
        _over_ranks(total)
        engines = {"critic": self.critic} | ({"policy": self.actor} if policy_learns else {})
        for name, norm in zip(engines, step(*engines.values()), strict=True):
            total[f"{name}_gradient_norm"] = norm
        return total

    def policy_loss(
        self, batch: SequenceBatch, rollout: Rollout, advantages: Tensor, part: np.ndarray
    ) -> LossOutput:
        """The clipped surrogate of one micro-batch."""
        logprobs = self.actor(
            response_logprobs, batch, temperature=self.settings.temperature, with_entropy=False
        ).logprobs
        return clipped_policy_loss(
            logprobs,
            _window(rollout.logprobs, part, logprobs),
            _window(advantages, part, logprobs),
            _window(rollout.response_mask, part, logprobs),
            clip=self.settings.policy_clip,
            reduce=self.settings.loss_reduce,
        )

    def value_loss(
        self, batch: SequenceBatch, rollout: Rollout, returns: Tensor, part: np.ndarray
    ) -> LossOutput:
        """The clipped value loss of one micro-batch."""
        values = self.critic(token_values, batch, before=True)
        return clipped_value_loss(
            values,
            _window(rollout.values, part, values),
            _window(returns, part, values),
            _window(rollout.response_mask, part, values),
            clip=self.settings.value_clip or 0.25,
            reduce=self.settings.loss_reduce,
        )

    def collate(self, rollout: Rollout, part: np.ndarray) -> SequenceBatch:
        """The prompts and responses of some rows as one batch."""
        return collate_sequences(
            [rollout.prompts[i] for i in part],
            [rollout.responses[i] for i in part],
            self.pad_id,
            rollout.response_mask.device,
        )

    def parts(self, rollout: Rollout, rows: np.ndarray) -> list[np.ndarray]:
        """A train batch in micro-batches of similar length."""
        lengths = [len(rollout.prompts[i]) + len(rollout.responses[i]) for i in rows]
        return micro_batches(np.array(lengths), rows, self.settings.micro_batch_size)


def _share(rollout: Rollout, part: np.ndarray, rows: np.ndarray) -> float:
    """The share of a micro-batch in the response tokens of its train batch."""
    tokens = [len(response) for response in rollout.responses]
    return sum(tokens[i] for i in part) / sum(tokens[i] for i in rows)


def _gather(total: dict[str, Tensor], figure: str, value: Tensor, share: float) -> None:
    """Add a micro-batch's mean over tokens, or take over its maximum."""
    if figure.endswith("_max"):
        total[figure] = torch.maximum(total.get(figure, value), value)
    else:
        total[figure] = total.get(figure, 0) + value * share


def _over_ranks(total: dict[str, Tensor]) -> None:
    """Complete figures of this process's micro-batches to those of the whole train batch."""
    for largest, reduce in ((False, all_reduce_sum), (True, max_over_ranks)):
        names = [name for name in total if name.endswith("_max") is largest]
        if names:
            whole = reduce(torch.stack([total[name].float() for name in names]))
            total.update(zip(names, whole.unbind(), strict=True))


def _window(values: Tensor, part: np.ndarray, like: Tensor) -> Tensor:
    """The rows `part` of a rollout's (R, T) tensor, cut to the width of `like`."""
    return values[torch.from_numpy(part).to(values.device), : like.shape[1]]
