"""train-ppo: PPO with dense rewards (method §5). `PPOTrainer.train` is the algorithm."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from denserl_cli.core.engine.base import NonFiniteError
from denserl_cli.core.observer import throughput, timed
from denserl_cli.core.ppo.advantages import generalized_advantages, whiten
from denserl_cli.core.ppo.rewards import AdaptiveKL, penalize_kl
from denserl_cli.core.recipe.functions import short_name
from denserl_cli.core.system.distributed import broadcast_object

if TYPE_CHECKING:
    from denserl_cli.core.ppo.evaluator import Evaluator
    from denserl_cli.core.ppo.prompts import PromptPlan
    from denserl_cli.core.ppo.rewards import RewardSources
    from denserl_cli.core.ppo.rollout import Collector, Rollout
    from denserl_cli.core.ppo.update import Updater
    from denserl_cli.core.recipe.resolved import ResolvedPPO
    from denserl_cli.core.runs.stage_session import Metrics, StageSession

HEADLINE = (
    *("true_reward", "rm_score", "kl", "response_length", "segments_per_response"),
    *("tokens_per_second", "responses_per_second"),
)
"""The metrics shown beside the progress bar; metrics.jsonl has all metrics."""


class PPOTrainer:
    """Trains a policy by PPO on dense rewards; `train` is the algorithm."""

    def __init__(
        self,
        settings: ResolvedPPO,
        session: StageSession,
        *,
        plan: PromptPlan,
        collector: Collector,
        sources: RewardSources,
        updater: Updater,
        evaluator: Evaluator,
        save_policy: Callable[[str], None],
    ) -> None:
        """Set up a trainer.

        Args:
            settings: The recipe's `ppo`.
            session: Records, checkpoints and stops; the trainer's state goes into its checkpoints.
            plan: The prompts of every iteration.
            collector: Makes rollouts.
            sources: What rewards are computed with.
            updater: Trains policy and critic.
            evaluator: Computes metrics and evaluates the policy.
            save_policy: Saves the policy in the run folder, under a name.
        """
        self.settings, self.session = settings, session
        self.plan, self.collector, self.sources = plan, collector, sources
        self.updater, self.evaluator, self.save_policy = updater, evaluator, save_policy
        self.kl = AdaptiveKL(
            settings.kl_coef, target=settings.kl_target, horizon=settings.kl_horizon
        )
        self.best: float | None = None
        self.start_segments: float | None = None
        self.warned = False
        self.beyond = False
        session.trainer = self

    def train(self, start: int) -> None:
        """Run the iterations after `start` to the last planned one, or until the KL limit."""
        if self.beyond:  # the stage was killed between its last checkpoint and its end
            return
        settings, session = self.settings, self.session
        session.observer.begin("train the policy", total=self.plan.iterations, done=start)
        self.collector.refresh()
        self.evaluate_start()
        with session.steps(start) as steps:
            for iteration in steps:
                began = time.perf_counter()
                prompts = self.plan.batch(iteration)
                count = len(prompts.prompts)
                with session.interruptible("sample responses", count, iteration - 1) as progress:
                    rollout = self.collector.collect(prompts.ids, prompts.keys, progress)
                mask = rollout.response_mask
                functions = self.sources.functions(prompts.prompts, rollout)
                rewards = self.sources.of(rollout, functions)
                penalized = penalize_kl(
                    rewards, rollout.logprobs, rollout.reference_logprobs, mask, self.kl.coef
                )
                advantages, returns = generalized_advantages(
                    penalized, rollout.values, mask, gamma=settings.gamma, lam=settings.lam
                )
                seconds = dict(self.collector.seconds)
                with timed(seconds, "update_seconds"):
                    metrics: Metrics = {}
                    if self.is_finite(iteration, rollout):
                        guarded = partial(session.guard.update, iteration, partial(_kept, rollout))
                        metrics = self.updater.update(
                            iteration, rollout, whiten(advantages, mask), returns, guarded
                        )
                        self.collector.refresh()
                described = self.evaluator.describe(prompts, rollout, functions, rewards, returns)
                metrics |= described.metrics | seconds
                metrics |= throughput(time.perf_counter() - began, rollout.tokens, count)
                if self.conclude(iteration, metrics, described.samples):
                    break

    def evaluate_start(self) -> None:
        """Record metrics of the starting policy, unless an interrupted run has done so."""
        recorded = bool(self.session.run.metrics(self.session.stage))
        if not broadcast_object(recorded):
            before = self.evaluator.evaluate()
            self.session.record(0, before.metrics, before.samples)
            self.keep_best(before.metrics)

    def is_finite(self, iteration: int, rollout: Rollout) -> bool:
        """Whether all numbers to learn from are finite.

        Where they are not, the session's guard counts a skipped update, or raises DenserlError.

        Args:
            iteration: Its number, from 1.
            rollout: Of the iteration.
        """
        measured = (rollout.token_values, rollout.logprobs, rollout.reference_logprobs)
        if all(torch.isfinite(values).all() for values in measured if values is not None):
            return True
        error = NonFiniteError("a reward or log-probability is not finite")
        self.session.guard.caught(iteration, error, partial(_kept, rollout))
        return False

    def conclude(self, iteration: int, metrics: Metrics, samples: list[dict[str, Any]]) -> bool:
        """Evaluate where it is due, adapt the weight of the KL penalty, and finish the step.

        Args:
            iteration: Its number, from 1.
            metrics: Of the iteration.
            samples: Of its rollout.

        Returns:
            Whether training is over.
        """
        settings = self.settings
        self.beyond = settings.kl_limit is not None and metrics["kl"] > settings.kl_limit
        last = iteration == self.plan.iterations or self.beyond
        if iteration % settings.eval_every == 0 or last:
            after = self.evaluator.evaluate()
            metrics |= after.metrics
            samples = [*samples, *after.samples]
            self.keep_best(after.metrics)
        metrics |= {"kl_coef": self.kl.coef}
        if math.isfinite(metrics["kl_per_token"]):
            self.kl.update(metrics["kl_per_token"], metrics["responses"])
        self.watch_segments(metrics["segments_per_response"])
        over = self.session.finish_step(iteration, metrics, samples, last=last)
        if self.beyond:
            self.session.observer.notice(
                f"stopped after iteration {iteration}: KL {metrics['kl']:.1f} nats a response is "
                f"beyond ppo.kl_limit {settings.kl_limit}"
            )
        return over

    def watch_segments(self, segments: float) -> None:
        """Give a notice, once, when the number of segments grows (method §8)."""
        if self.start_segments is None:
            self.start_segments = segments
        elif not self.warned and segments > 1.5 * self.start_segments:
            self.warned = True
            self.session.observer.notice(
                f"segments per response rose from {self.start_segments:.1f} to {segments:.1f}: "
                "the policy may be paid for surprising text; try ppo.segment_total=mean or a "
                "higher ppo.kl_coef"
            )

    def keep_best(self, evaluated: Mapping[str, Any]) -> None:
        """Save the policy with the highest reward on the held-out prompts, if there are any."""
        weights = {"rm_score": self.settings.reward_model_weight}
        weights |= {f"reward_{short_name(o.function)}": o.weight for o in self.settings.reward}
        score = sum(
            weight * evaluated.get(f"eval_{name}", math.nan)
            for name, weight in weights.items()
            if weight
        )
        if math.isfinite(score) and (self.best is None or score > self.best):
            self.best = score
            self.save_policy("policy_best")

    def summary(self) -> dict[str, Any]:
        """The summary of the finished stage: the evaluations before and after training."""
        lines = self.session.run.metrics(self.session.stage)
        first, last = lines[0], lines[-1]
        names = [name for name in last if name in first and name.startswith("eval_")]
        evaluated = {name: {"start": first[name], "end": last[name]} for name in names}
        return {"iterations": last["step"], **evaluated}

    def state(self) -> dict[str, Any]:
        """State for a checkpoint, beside the engines'; prompts and noise follow from the step."""
        names = ("best", "start_segments", "warned", "beyond")
        return {"kl_coef": self.kl.coef, **{name: getattr(self, name) for name in names}}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` returned."""
        self.kl.coef = state["kl_coef"]
        self.best, self.start_segments = state["best"], state["start_segments"]
        self.warned, self.beyond = state["warned"], state["beyond"]


def _kept(rollout: Rollout) -> dict[str, Any]:
    """A rollout in a form that torch.save can write for inspection."""
    kept = rollout._asdict()
    for name in ("prompts", "responses"):
        kept[name] = [torch.from_numpy(ids) for ids in kept[name]]
    return kept
