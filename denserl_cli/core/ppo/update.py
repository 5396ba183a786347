"""The clipped updates of policy and critic over one rollout."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from denserl_cli.core.data.batches import SequenceBatch, collate_sequences, micro_batches
from denserl_cli.core.engine.base import step
from denserl_cli.core.models.causal_lm import response_logprobs
from denserl_cli.core.models.scalar_head import token_values
from denserl_cli.core.ppo.importance import importance_weights
from denserl_cli.core.ppo.losses import (
    LossOutput,
    clipped_policy_loss,
    clipped_value_loss,
    kl_loss,
    masked_mean,
)
from denserl_cli.core.ppo.self_checks import refuse_other_ratio
from denserl_cli.core.system.distributed import all_reduce_sum, max_over_ranks, shard_micro_batches

if TYPE_CHECKING:
    from denserl_cli.core.engine.base import Engine
    from denserl_cli.core.ppo.rollout import Rollout
    from denserl_cli.core.recipe.resolved import ResolvedPPO


class Updater:
    """Trains actor and critic, if there is one, on rollouts in train batches split by length."""

    def __init__(
        self,
        settings: ResolvedPPO,
        *,
        actor: Engine,
        critic: Engine | None,
        pad_id: int,
        seed: int,
        ratio_tolerance: float | None = None,
    ) -> None:
        """Set up an updater.

        Args:
            settings: The recipe's `ppo`.
            actor: The policy.
            critic: Trained beside it.
            pad_id: Token that fills batches up.
            seed: Of the order of responses.
            ratio_tolerance: What the policy may differ from itself before its first update, see
                `refuse_other_ratio`; None: not checked.
        """
        self.settings, self.actor, self.critic = settings, actor, critic
        self.pad_id, self.seed = pad_id, seed
        self.ratio_tolerance = ratio_tolerance

    def update(
        self,
        iteration: int,
        rollout: Rollout,
        advantages: Tensor,
        returns: Tensor | None,
        guarded: Callable[[], AbstractContextManager[None]] = nullcontext,
        *,
        kl_coef: float = 0.0,
    ) -> dict[str, float]:
        """Take every optimizer step of one iteration.

        Args:
            iteration: Its number, from 1.
            rollout: With R responses.
            advantages: (R, T).
            returns: (R, T), the critic's targets; None without a critic.
            guarded: Makes the context of each step, in which a step raises NonFiniteError before
                either model is changed.
            kl_coef: Weight of the KL in the policy's loss.

        Returns:
            Mean metrics of the steps.
        """
        settings = self.settings
        rates = {"policy_learning_rate": self.actor.learning_rate}
        if self.critic is not None:
            rates["critic_learning_rate"] = self.critic.learning_rate
        policy_learns = iteration > settings.critic_warmup
        steps = []
        for epoch in range(settings.epochs):
            rng = np.random.default_rng([self.seed, iteration, epoch])
            order = rng.permutation(len(rollout.responses))
            for rows in np.split(order, len(order) // settings.train_batch_size):
                with guarded():
                    found = self.step(rollout, advantages, returns, rows, policy_learns, kl_coef)
                    steps.append(found)
        if not steps:
            return rates
        means = {name: torch.stack([s[name] for s in steps]).mean() for name in steps[0]}
        return rates | dict(zip(means, torch.stack(list(means.values())).tolist(), strict=True))

    def step(
        self,
        rollout: Rollout,
        advantages: Tensor,
        returns: Tensor | None,
        rows: np.ndarray,
        policy_learns: bool,
        kl_coef: float = 0.0,
    ) -> dict[str, Tensor]:
        """One optimizer step on a train batch; micro-batches weigh by their share of it.

        Args:
            rollout: With R responses.
            advantages: (R, T).
            returns: (R, T); None without a critic.
            rows: Numbers of the responses in the train batch.
            policy_learns: False trains the critic alone.
            kl_coef: Weight of the KL in the policy's loss.

        Returns:
            Metrics of the step by name, 0-d each.
        """
        total = dict[str, Tensor]()
        mine = shard_micro_batches(self.parts(rollout, rows))
        for number, (part, counts) in enumerate(mine, 1):
            batch = self.collate(rollout, part)
            last = number == len(mine)
            tokens = _share(rollout, part, rows) * counts
            by_token = self.settings.loss_reduce == "token"
            weight = tokens if by_token else len(part) / len(rows) * counts
            if self.critic is not None and returns is not None:
                value_loss = self.value_loss(self.critic, batch, rollout, returns, part)
                self.critic.backward(value_loss.loss * weight, last=last)
                _add(total, "value", value_loss, weight, tokens)
            if policy_learns:
                policy_loss = self.policy_loss(batch, rollout, advantages, part, kl_coef)
                self.actor.backward(policy_loss.loss * weight, last=last)
                _add(total, "policy", policy_loss, weight, tokens)
        _over_ranks(total)
        if policy_learns and self.ratio_tolerance is not None:
            refuse_other_ratio(total["policy_approx_kl"].item(), self.ratio_tolerance)
            self.ratio_tolerance = None  # from now on the policy moves within an iteration
        engines = {} if self.critic is None else {"critic": self.critic}
        engines |= {"policy": self.actor} if policy_learns else {}
        for name, norm in zip(engines, step(*engines.values()), strict=True):
            total[f"{name}_gradient_norm"] = norm
        return total

    def value_loss(
        self,
        critic: Engine,
        batch: SequenceBatch,
        rollout: Rollout,
        returns: Tensor,
        part: np.ndarray,
    ) -> LossOutput:
        """The critic's loss on a micro-batch, the rows `part` of the rollout."""
        settings, mask = self.settings, batch.response_mask
        return clipped_value_loss(
            critic(token_values, batch, before=True),
            _window(rollout.values, part, mask),
            _window(returns, part, mask),
            mask,
            clip=None if settings.value_clip == "none" else settings.value_clip,
            **self.reduction,
        )

    def policy_loss(
        self,
        batch: SequenceBatch,
        rollout: Rollout,
        advantages: Tensor,
        part: np.ndarray,
        kl_coef: float,
    ) -> LossOutput:
        """The policy's loss on a micro-batch, the rows `part` of the rollout."""
        settings, mask = self.settings, batch.response_mask
        drawn = settings.entropy_coef != 0
        logprobs, entropy = self.actor(
            response_logprobs,
            batch,
            temperature=settings.rollout.temperature,
            with_entropy=drawn,
            drawn=drawn,
        )
        found = clipped_policy_loss(
            logprobs,
            _window(rollout.logprobs, part, mask),
            _window(advantages, part, mask),
            mask,
            clip=settings.policy_clip,
            clip_high=settings.policy_clip_high,
            dual_clip=settings.dual_clip,
            weights=self.weights(rollout, part, mask),
            **self.reduction,
        )
        loss = found.loss
        if settings.kl_loss is not None:
            reference = _window(rollout.reference_logprobs, part, mask)
            estimate = settings.kl_loss
            kl = kl_loss(logprobs, reference, mask, estimator=estimate, **self.reduction)
            loss = loss + kl_coef * kl
        if entropy is not None:
            loss = loss - settings.entropy_coef * masked_mean(entropy, mask, **self.reduction)
        return found._replace(loss=loss)

    @property
    def reduction(self) -> dict[str, Any]:
        """How the losses of tokens become one."""
        return {"reduce": self.settings.loss_reduce, "length": self.settings.rollout.max_new_tokens}

    def weights(self, rollout: Rollout, part: np.ndarray, mask: Tensor) -> Tensor | None:
        """Importance weights of some rows, (B, T); None where nothing is to be corrected."""
        if rollout.sampled_logprobs is None:
            return None
        return importance_weights(
            _window(rollout.logprobs, part, mask),
            _window(rollout.sampled_logprobs, part, mask),
            mask,
            level=self.settings.rollout.correction,
            cap=self.settings.rollout.importance_cap,
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
