"""Metrics and samples of rollouts, and the evaluation of the policy on held-out prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from denserl_cli.core.ppo.importance import mismatch_metrics
from denserl_cli.core.ppo.metrics import (
    explained_variance,
    reward_metrics,
    rollout_metrics,
    samples,
)
from denserl_cli.core.system.distributed import broadcast_object

if TYPE_CHECKING:
    from denserl_cli.core.ppo.prompts import PromptBatch
    from denserl_cli.core.ppo.reward_sources import RewardSources, SourceRewards
    from denserl_cli.core.ppo.rollout import Collector, Rollout
    from denserl_cli.core.recipe.resolved import ResolvedRecipe
    from denserl_cli.core.runs.stage_session import Metrics, Sample
    from denserl_cli.core.sandbox.task import TrueReward


class Described(NamedTuple):
    """What metrics.jsonl and samples.jsonl record of a rollout."""

    metrics: Metrics
    samples: list[Sample]


class Evaluator:
    """Computes metrics and samples of rollouts, also of those on held-out prompts."""

    def __init__(
        self,
        recipe: ResolvedRecipe,
        *,
        collector: Collector,
        sources: RewardSources,
        prompts: PromptBatch,
        tokenizer: Any,
        true_reward: TrueReward | None,
    ) -> None:
        """Set up an evaluator.

        Args:
            recipe: Says how responses are scored and how many samples to log.
            collector: Makes the rollouts of an evaluation.
            sources: What rewards are computed with.
            prompts: The held-out prompts, repeated for each sample.
            tokenizer: Decodes responses.
            true_reward: The task's true reward; None where it is not known.
        """
        self.aggregate, self.log_samples = recipe.reward_model.aggregate, recipe.run.log_samples
        self.rollout = recipe.ppo.rollout
        self.samples_per_prompt = recipe.ppo.eval_samples
        self.collector, self.sources, self.prompts = collector, sources, prompts
        self.tokenizer, self.true_reward = tokenizer, true_reward

    def describe(
        self,
        prompts: PromptBatch,
        rollout: Rollout,
        rewards: SourceRewards,
        returns: Tensor | None,
    ) -> Described:
        """The metrics of a training rollout, and its first samples.

        Args:
            prompts: The prompts of the rollout.
            rollout: With R responses.
            rewards: Of its responses.
            returns: (R, T), the critic's targets; None without a critic.
        """
        settings, normalizer = self.sources.settings, self.sources.normalizer
        tensors = self._means(rollout, rewards) | self._mismatch(rollout)
        tensors |= reward_metrics(rollout, rewards.tokens, settings.clip, normalizer)
        if returns is not None:
            mask = rollout.response_mask
            tensors["explained_variance"] = explained_variance(rollout.values, returns, mask)
        metrics = to_numbers(tensors) | self._true_reward(prompts, rollout)
        shown = self._samples(prompts, rollout, rewards.tokens)
        return Described(metrics | {"responses": len(rollout.responses)}, shown)

    def evaluate(self) -> Described:
        """Metrics and samples of a rollout on the held-out prompts, always with the same noise."""
        if not self.prompts.prompts:
            return Described({}, [])
        rollout = self.collector.collect(self.prompts.ids, self.prompts.keys)
        rewards = self.sources(self.prompts.prompts, rollout)
        tensors = self._means(rollout, rewards)
        metrics = to_numbers(tensors) | self._true_reward(self.prompts, rollout)
        shown = self._samples(self.prompts, rollout, rewards.tokens, self.samples_per_prompt)
        return Described(
            {f"eval_{name}": value for name, value in metrics.items()},
            [{"held_out": True, **sample} for sample in shown],
        )

    def _means(self, rollout: Rollout, rewards: SourceRewards) -> dict[str, Tensor]:
        """Means over the responses, those of the sources of rewards among them."""
        means = {name: values.mean() for name, values in rewards.totals.items()}
        return means | rollout_metrics(rollout, self.aggregate)

    def _mismatch(self, rollout: Rollout) -> dict[str, Tensor]:
        """How far sampler and trainer are apart, unless they are the same by construction."""
        level, sampled = self.rollout.correction, rollout.sampled_logprobs
        if sampled is None or (level == "none" and self.collector.sampler.exact):
            return {}
        return mismatch_metrics(
            rollout.logprobs,
            sampled,
            rollout.response_mask,
            level=level,
            cap=self.rollout.importance_cap,
        )

    def _samples(
        self, prompts: PromptBatch, rollout: Rollout, rewards: Tensor, every: int = 1
    ) -> list[Sample]:
        texts = [prompt.messages[-1]["content"] for prompt in prompts.prompts]
        return samples(rollout, rewards, self.tokenizer, texts, self.log_samples, every)

    def _true_reward(self, prompts: PromptBatch, rollout: Rollout) -> Metrics:
        if self.true_reward is None:
            return {}
        texts = self.tokenizer.batch_decode(rollout.responses, skip_special_tokens=True)
        pairs = zip(prompts.prompts, texts, strict=True)
        rewards = [self.true_reward(prompt.messages[-1]["content"], text) for prompt, text in pairs]
        return {"true_reward": sum(rewards) / len(rewards)}


def to_numbers(tensors: dict[str, Tensor]) -> Metrics:
    """Metrics as numbers, in one transfer: a 0-d tensor becomes a number, another one a list.

    All processes get those of the first one, so that they all take the same decisions.
    """
    flat = torch.cat([tensor.double().reshape(-1) for tensor in tensors.values()]).tolist()
    found: Metrics = {}
    start = 0
    for name, tensor in tensors.items():
        part = flat[start : start + tensor.numel()]
        found[name], start = part if tensor.dim() else part[0], start + tensor.numel()
    return dict(broadcast_object(found))
