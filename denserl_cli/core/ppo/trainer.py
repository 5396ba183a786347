"""train-ppo: PPO with dense rewards (method §5). `PPOTrainer.train` is the algorithm."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from denserl_cli.core.engine.base import NonFiniteError
from denserl_cli.core.engine.random_state import random_state, restore_random_state
from denserl_cli.core.errors import Interrupted
from denserl_cli.core.observer import throughput, timed
from denserl_cli.core.ppo.advantages import generalized_advantages, whiten
from denserl_cli.core.ppo.metrics import (
    explained_variance,
    reward_figures,
    rollout_figures,
    samples,
)
from denserl_cli.core.ppo.rewards import AdaptiveKL, dense_rewards, penalize_kl
from denserl_cli.core.ppo.update import Updater
from denserl_cli.core.recipe.functions import short_name
from denserl_cli.core.runs.failures import NonFiniteGuard
from denserl_cli.core.system.distributed import (
    all_gather_object,
    any_rank,
    broadcast_object,
    rank,
    world_size,
)
from denserl_cli.core.system.signals import stop_requested

if TYPE_CHECKING:
    from denserl_cli.core.normalizer import LocationNormalizer
    from denserl_cli.core.observer import Observer
    from denserl_cli.core.ppo.collect import Collector
    from denserl_cli.core.ppo.prompts import PromptBatch, PromptPlan
    from denserl_cli.core.ppo.reward_functions import RewardFunctions
    from denserl_cli.core.ppo.rewards import TokenRewards
    from denserl_cli.core.ppo.rollout import Rollout
    from denserl_cli.core.recipe.schema import Recipe
    from denserl_cli.core.runs.checkpoints import Checkpoint
    from denserl_cli.core.runs.folder import RunFolder
    from denserl_cli.core.sandbox.task import TrueReward

STAGE = "train-ppo"
HEADLINE = (
    *("true_reward", "rm_score", "kl", "response_length", "segments_per_response"),
    *("tokens_per_second", "responses_per_second"),
)
"""The figures beside the progress bar; metrics.jsonl has them all."""


class PPOTrainer:
    """Holds policy, critic and what scores them; one call of `train` is one run of PPO."""

    def __init__(
        self,
        recipe: Recipe,
        run: RunFolder,
        observer: Observer,
        *,
        plan: PromptPlan,
        evaluation: PromptBatch,
        update: Updater,
        collect: Collector,
        normalizer: LocationNormalizer | None,
        own: RewardFunctions,
        tokenizer: Any,
        judge: TrueReward | None,
        save_policy: Callable[[str], None],
    ) -> None:
        self.settings, self.recipe = recipe.ppo, recipe
        self.run, self.observer = run, observer
        self.plan, self.evaluation = plan, evaluation
        self.update, self.collect = update, collect
        self.normalizer, self.own = normalizer, own
        self.tokenizer, self.judge = tokenizer, judge
        self.save_policy = save_policy
        self.kl = AdaptiveKL(
            recipe.ppo.kl_coef, target=recipe.ppo.kl_target, horizon=recipe.ppo.kl_horizon
        )
        self.guard = NonFiniteGuard(STAGE, run, observer)
        self.best: float | None = None
        self.start_segments: float | None = None
        self.warned = False
        self.beyond = False

    def train(self, start: int) -> None:
        """Run the iterations after `start`, as many as are planned or the KL limit allows."""
        if self.beyond:  # killed between its last checkpoint and its end
            return
        settings = self.settings
        self.observer.begin("train the policy", total=self.plan.iterations, done=start)
        if not broadcast_object(
            bool(self.run.metrics(STAGE))
        ):  # a run that was stopped in its first iteration has them
            before = self.evaluate()
            self.record(0, before)
            self.keep_best(before)
        with stop_requested() as stopping:
            for iteration in range(start + 1, self.plan.iterations + 1):
                began = time.perf_counter()
                prompts = self.plan.batch(iteration)
                rollout = self.roll_out(iteration, prompts, stopping)
                own = self.own(prompts.prompts, rollout)
                earned = dense_rewards(rollout, self.recipe, self.normalizer, own)
                rewards = penalize_kl(
                    earned,
                    rollout.logprobs,
                    rollout.reference_logprobs,
                    rollout.response_mask,
                    self.kl.coef,
                )
                advantages, returns = generalized_advantages(
                    rewards,
                    rollout.values,
                    rollout.response_mask,
                    gamma=settings.gamma,
                    lam=settings.lam,
                )
                seconds = dict(self.collect.seconds)
                with timed(seconds, "update_seconds"):
                    stats: dict[str, Any] = self.learn(iteration, rollout, advantages, returns)
                stats |= self.describe(prompts, rollout, own, earned, returns) | seconds
                stats |= _throughput(rollout, time.perf_counter() - began)
                if self.conclude(iteration, stats, any_rank(stopping())):
                    break
        self.observer.end()

    def roll_out(
        self, iteration: int, prompts: PromptBatch, stopping: Callable[[], bool]
    ) -> Rollout:
        """Collect a rollout; on Ctrl-C, checkpoint the iteration before and leave."""

        def leave_if_asked(sampled: int) -> None:
            self.observer.advance(sampled)
            if world_size() == 1 and stopping():  # several processes agree between iterations
                raise self.interrupted(iteration - 1)

        self.observer.begin("sample responses", total=len(prompts.prompts))
        rollout = self.collect(prompts.ids, prompts.keys, progress=leave_if_asked)
        self.observer.end()
        return rollout

    def learn(
        self, iteration: int, rollout: Rollout, advantages: Tensor, returns: Tensor
    ) -> dict[str, float]:
        """Update policy and critic, unless a number on the way is not finite."""
        measured = (rollout.token_values, rollout.logprobs, rollout.reference_logprobs)
        if not all(torch.isfinite(values).all() for values in measured if values is not None):
            error = NonFiniteError("a reward or log-probability is not finite")
            self.guard.caught(iteration, error, partial(_kept, rollout))
            return {}
        advantages = whiten(advantages, rollout.response_mask)
        guarded = partial(self.guard.update, iteration, partial(_kept, rollout))
        return self.update(iteration, rollout, advantages, returns, guarded)

    def describe(
        self,
        prompts: PromptBatch,
        rollout: Rollout,
        own: TokenRewards | None,
        earned: Tensor,
        returns: Tensor,
    ) -> dict[str, Any]:
        """The figures of a rollout, and its first samples."""
        mask = rollout.response_mask
        figures = self.figures(rollout, own) | {
            **reward_figures(rollout, earned, self.recipe, self.normalizer),
            "explained_variance": explained_variance(rollout.values, returns, mask),
        }
        stats = _numbers(figures) | self.true_reward(prompts, rollout)
        shown = self.samples(prompts, rollout, earned)
        return stats | {"responses": len(rollout.responses), "samples": shown}

    def figures(self, rollout: Rollout, own: TokenRewards | None) -> dict[str, Tensor]:
        """Means over the responses, with those of the user's own rewards."""
        totals = {} if own is None else own.totals
        means = {name: values.mean() for name, values in totals.items()}
        return means | rollout_figures(rollout, self.recipe.reward_model.aggregate)

    def samples(
        self, prompts: PromptBatch, rollout: Rollout, earned: Tensor, every: int = 1
    ) -> list[dict[str, Any]]:
        """As many responses, with their segments' rewards, as the recipe wants to see."""
        texts = [prompt.messages[-1]["content"] for prompt in prompts.prompts]
        count = self.recipe.run.log_samples
        return samples(rollout, earned, self.tokenizer, texts, count, every)

    def true_reward(self, prompts: PromptBatch, rollout: Rollout) -> dict[str, float]:
        """The task's own reward, where it knows one."""
        if self.judge is None:
            return {}
        texts = self.tokenizer.batch_decode(rollout.responses, skip_special_tokens=True)
        pairs = zip(prompts.prompts, texts, strict=True)
        rewards = [self.judge(prompt.messages[-1]["content"], text) for prompt, text in pairs]
        return {"true_reward": sum(rewards) / len(rewards)}

    def evaluate(self) -> dict[str, Any]:
        """The rollout figures on the held-out prompts, under the same noise each time; samples."""
        if not self.evaluation.prompts:
            return {}
        rollout = self.collect(self.evaluation.ids, self.evaluation.keys)
        own = self.own(self.evaluation.prompts, rollout)
        figures = self.figures(rollout, own)
        stats = _numbers(figures) | self.true_reward(self.evaluation, rollout)
        earned = dense_rewards(rollout, self.recipe, self.normalizer, own)
        shown = self.samples(self.evaluation, rollout, earned, every=self.settings.eval_samples)
        named = {f"eval_{name}": value for name, value in stats.items()}
        return named | {"eval_samples": [{"held_out": True, **sample} for sample in shown]}

    def conclude(self, iteration: int, stats: dict[str, Any], stop: bool) -> bool:
        """Evaluate, record, keep the best, checkpoint; tells whether training is over."""
        settings, total = self.settings, self.plan.iterations
        self.beyond = settings.kl_limit is not None and stats["kl"] > settings.kl_limit
        last = iteration == total or self.beyond
        if iteration % settings.eval_every == 0 or last:
            after = self.evaluate()
            stats |= after
            self.keep_best(after)
        stats |= {"kl_coef": self.kl.coef, **self.guard.figures()}
        if math.isfinite(stats["kl_per_token"]):
            self.kl.update(stats["kl_per_token"], stats["responses"])
        self.record(iteration, stats)
        self.watch_segments(stats["segments_per_response"])
        if iteration % settings.save_every == 0 or last:
            self.save(iteration)
        if self.beyond:
            self.observer.notice(
                f"stopped after iteration {iteration}: KL {stats['kl']:.1f} nats a response is "
                f"beyond ppo.kl_limit {settings.kl_limit}"
            )
        if stop and not last:
            raise self.interrupted(iteration)
        return last

    def record(self, iteration: int, stats: dict[str, Any]) -> None:
        """Figures to metrics.jsonl and to the observer, samples to samples.jsonl."""
        shown = [*stats.pop("samples", []), *stats.pop("eval_samples", [])]
        self.run.log(STAGE, iteration, stats)
        for sample in shown:
            self.run.log(STAGE, iteration, sample, file="samples.jsonl")
        own = [name for name in stats if name.startswith("reward_")]
        headline = {name: stats[name] for name in (*own, *HEADLINE) if name in stats}
        self.observer.advance(1 if iteration else 0, **headline)

    def watch_segments(self, segments: float) -> None:
        """Say so, once, when the policy earns by making more segments (method §8)."""
        if self.start_segments is None:
            self.start_segments = segments
        elif not self.warned and segments > 1.5 * self.start_segments:
            self.warned = True
            self.observer.notice(
                f"segments per response rose from {self.start_segments:.1f} to {segments:.1f}: "
                "the policy may be paid for surprising text; try ppo.segment_total=mean or a "
                "higher ppo.kl_coef"
            )

    def keep_best(self, evaluated: dict[str, float]) -> None:
        """Keep the policy with the highest reward on the held-out prompts, if there are any."""
        score = self.score(evaluated)
        if math.isfinite(score) and (self.best is None or score > self.best):
            self.best = score
            self.save_policy("policy_best")

    def score(self, evaluated: dict[str, float]) -> float:
        """What the best policy has most of: the rewards' means by their weights."""
        weights = {"rm_score": self.settings.learned_weight}
        weights |= {f"reward_{short_name(o.function)}": o.weight for o in self.settings.reward}
        return sum(
            weight * evaluated.get(f"eval_{name}", math.nan)
            for name, weight in weights.items()
            if weight
        )

    def summary(self) -> dict[str, Any]:
        """What the finished stage reports: the evaluations before and after training."""
        lines = self.run.metrics(STAGE)
        first, last = lines[0], lines[-1]
        names = [name for name in last if name in first and name.startswith("eval_")]
        evaluated = {name: {"start": first[name], "end": last[name]} for name in names}
        return {"iterations": last["step"], **evaluated}

    def interrupted(self, iteration: int) -> Interrupted:
        """Checkpoint the state after `iteration`; returns the error that ends the command."""
        self.save(iteration)
        return Interrupted(
            f"stopped after iteration {iteration} of {self.plan.iterations}; "
            f"the state is in {self.run.path}",
            hint="go on with --resume",
        )

    def save(self, iteration: int) -> None:
        """Write everything that resuming needs; prompts and noise follow from the iteration."""
        state = {
            "actor": self.update.actor.state(),
            "critic": self.update.critic.state(),
            "random": all_gather_object(random_state()),
            "guard": self.guard.state(),
            "kl_coef": self.kl.coef,
            "best": self.best,
            "start_segments": self.start_segments,
            "warned": self.warned,
            "beyond": self.beyond,
        }
        shards = {"actor": self.update.actor, "critic": self.update.critic}
        self.run.save_checkpoint(STAGE, iteration, state, shards)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take over what `save` wrote."""
        state = checkpoint.state
        self.update.actor.restore(state["actor"])
        self.update.critic.restore(state["critic"])
        self.update.actor.load_shards(checkpoint.folder / "actor")
        self.update.critic.load_shards(checkpoint.folder / "critic")
        restore_random_state(state["random"][rank()])
        self.guard.restore(state["guard"])
        self.kl.coef = state["kl_coef"]
        self.best, self.start_segments = state["best"], state["start_segments"]
        self.warned, self.beyond = state["warned"], state["beyond"]


def _numbers(figures: dict[str, Tensor]) -> dict[str, Any]:
    """One transfer for all figures; the first process's, so that all decide the same by them.

    A 0-d figure becomes a number, another one a list of them.
    """
    flat = torch.cat([figure.double().reshape(-1) for figure in figures.values()]).tolist()
    found, place = {}, 0
    for name, figure in figures.items():
        part = flat[place : place + figure.numel()]
        found[name], place = part if figure.dim() else part[0], place + figure.numel()
    return broadcast_object(found)


def _throughput(rollout: Rollout, seconds: float) -> dict[str, float]:
    tokens = sum(len(ids) for ids in (*rollout.prompts, *rollout.responses))
    return throughput(seconds, tokens, len(rollout.responses))


def _kept(rollout: Rollout) -> dict[str, Any]:
    """A rollout in a form that torch.save keeps for inspection."""
    kept = rollout._asdict()
    for name in ("prompts", "responses"):
        kept[name] = [torch.from_numpy(ids) for ids in kept[name]]
    return kept
