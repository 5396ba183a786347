"""One rollout: sample responses, then measure everything that the update needs on them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from denserl_cli.core.data.batches import SequenceBatch, collate_sequences, micro_batches
from denserl_cli.core.models.causal_lm import ResponseScores, response_logprobs
from denserl_cli.core.models.scalar_head import token_values
from denserl_cli.core.observer import timed
from denserl_cli.core.sampling.base import Progress, Response, Sampling
from denserl_cli.core.system.distributed import all_reduce_sum, shard_micro_batches

if TYPE_CHECKING:
    from denserl_cli.core.engine.base import Engine
    from denserl_cli.core.engine.frozen import LocalModel
    from denserl_cli.core.sampling.sampler import Sampler
    from denserl_cli.core.scoring.scorer import Scorer


class Rollout(NamedTuple):
    """Responses and everything that was measured on them, for one iteration.

    Tensors are (R, T), zero where masked, with T the length of the longest response, unless another
    shape is given.

    Attributes:
        prompts: Token ids of the R prompts.
        responses: Token ids of the R responses.
        terminated: (R,) bool, whether each response ended by itself.
        response_mask: bool.
        logprobs: Nats, of the policy that sampled.
        policy_entropy: Nats, of the distribution that the policy drew each token from; None where
            the log-probabilities are those of a sampler that does not know it.
        reference_logprobs: Nats, of the reference.
        entropy: Nats, of the reference after each token.
        values: The critic's, in the state before each token.
        token_values: The reward model's at each token; None without one.
        ends: bool, of the segments.
        measured: What sources of rewards asked for beyond that, (R, T) or (R,), by the model that
            it is of (empty: the run's reward model) and by name.
        sampled_logprobs: Nats, under the distribution that each token was drawn from; None where
            the sampler's are not known.
    """

    prompts: list[np.ndarray]
    responses: list[np.ndarray]
    terminated: Tensor
    response_mask: Tensor
    logprobs: Tensor
    policy_entropy: Tensor | None
    reference_logprobs: Tensor
    entropy: Tensor
    values: Tensor
    token_values: Tensor | None
    ends: Tensor
    measured: Mapping[tuple[str, str], Tensor] = MappingProxyType({})
    sampled_logprobs: Tensor | None = None

    @property
    def tokens(self) -> int:
        """Tokens of all prompts and responses."""
        return sum(len(ids) for ids in (*self.prompts, *self.responses))


class Collector:
    """Makes rollouts with a sampler, policy and critic, and the frozen models of a scorer."""

    def __init__(
        self,
        *,
        sampler: Sampler,
        policy: Engine | LocalModel,
        critic: Engine | LocalModel | None = None,
        scorer: Scorer,
        sampling: Sampling,
        micro_batch_size: int,
        pad_id: int,
        sampled_logprobs: bool = False,
    ) -> None:
        """Set up a collector.

        Args:
            sampler: Samples responses from the policy.
            policy: Measures them.
            critic: Without one the values stay 0.
            scorer: Reference and reward model.
            sampling: How tokens are drawn.
            micro_batch_size: Responses that are scored together.
            pad_id: Token that fills batches up.
            sampled_logprobs: Take the policy's log-probabilities and entropies from the sampler,
                without a pass of its own.
        """
        self.sampler, self.policy, self.critic, self.scorer = sampler, policy, critic, scorer
        self.sampling, self.micro_batch_size = sampling, micro_batch_size
        self.pad_id, self.sampled_logprobs = pad_id, sampled_logprobs
        self.device = policy.device
        self.seconds: dict[str, float] = {}
        """Wall time of the two phases of the latest rollout."""

    def refresh(self) -> None:
        """Sample from the policy's present weights: before the first rollout, after each update."""
        self.sampler.refresh()

    @torch.no_grad()
    def collect(
        self,
        prompts: Sequence[np.ndarray],
        keys: Sequence[Sequence[int]],
        progress: Progress = lambda _: None,
    ) -> Rollout:
        """Sample one response for each prompt and score all of them.

        Args:
            prompts: Ids of each prompt.
            keys: The key of each response, from which its randomness comes.
            progress: Called with the number of responses that have just been sampled.
        """
        models = [held.model for held in (self.policy, self.critic) if held is not None]
        with evaluating(*models):
            with timed(self.seconds, "rollout_seconds"):
                responses = self.sampler.sample(prompts, keys, self.sampling, progress=progress)
            with timed(self.seconds, "scoring_seconds"), self.scorer.on_device():
                return self.score(prompts, responses)

    def score(self, prompts: Sequence[np.ndarray], responses: Sequence[Response]) -> Rollout:
        """One pass of each model over the responses, in batches of similar length."""
        shape = (len(responses), max(len(response.ids) for response in responses))
        names = ["logprobs", "reference_logprobs", "entropy", "values"]
        known = all(response.entropy is not None for response in responses)
        names += ["policy_entropy"] if known or not self.sampled_logprobs else []
        names += ["token_values"] if self.scorer.reward_model is not None else []
        columns = {name: torch.zeros(shape, device=self.device) for name in names}
        further: dict[tuple[str, str], Tensor] = {}
        mask, ends = (torch.zeros(shape, dtype=torch.bool, device=self.device) for _ in "me")
        terminated = torch.tensor([r.terminated for r in responses], device=self.device)
        sampled = pad_sequence(
            [torch.from_numpy(response.logprobs) for response in responses], batch_first=True
        )
        lengths = [len(p) + len(r.ids) for p, r in zip(prompts, responses, strict=True)]
        parts = micro_batches(lengths, np.arange(len(lengths)), self.micro_batch_size)
        for part, counts in shard_micro_batches(parts):
            batch = collate_sequences(
                [prompts[i] for i in part],
                [responses[i].ids for i in part],
                self.pad_id,
                self.device,
            )
            rows = torch.from_numpy(part).to(self.device)
            temperature = self.sampling.temperature
            scored = self.scorer(batch, terminated[rows], temperature=temperature)
            policy = self._policy_scores(batch, [responses[i] for i in part])
            values = None if self.critic is None else self.critic(token_values, batch, before=True)
            window = batch.response_mask
            for key, found in scored.measured.items():
                whole = torch.zeros(shape[: found.dim()], device=self.device)
                place = (rows, slice(window.shape[1]))[: found.dim()]
                further.setdefault(key, whole)[place] = found if counts else 0.0
            if not counts:
                continue
            measured: dict[str, Tensor | None] = {
                "logprobs": policy.logprobs,
                "policy_entropy": policy.entropy,
                "reference_logprobs": scored.reference_logprobs,
                "entropy": scored.entropy,
                "values": values,
                "token_values": scored.token_values,
            }
            for name, part_values in measured.items():
                if part_values is not None:
                    columns[name][rows, : window.shape[1]] = part_values
            mask[rows, : window.shape[1]] = window
            ends[rows, : window.shape[1]] = scored.ends
        for measured_everywhere in (*columns.values(), *further.values(), mask, ends):
            all_reduce_sum(measured_everywhere)  # each process has filled in rows of its own
        return Rollout(
            prompts=list(prompts),
            responses=[response.ids for response in responses],
            terminated=terminated,
            response_mask=mask,
            ends=ends,
            policy_entropy=columns.pop("policy_entropy", None),
            token_values=columns.pop("token_values", None),
            measured=further,
            sampled_logprobs=sampled.to(self.device),
            **columns,
        )

    @torch.no_grad()
    def valued_again(self, rollout: Rollout) -> Rollout:
        """The same rollout with the values of the critic as it is now."""
        if self.critic is None:
            return rollout
        values = torch.zeros_like(rollout.values)
        lengths = [len(p) + len(r) for p, r in zip(rollout.prompts, rollout.responses, strict=True)]
        parts = micro_batches(lengths, np.arange(len(lengths)), self.micro_batch_size)
        self.seconds = {"rollout_seconds": 0.0}
        with evaluating(self.critic.model), timed(self.seconds, "scoring_seconds"):
            for part, counts in shard_micro_batches(parts):
                batch = collate_sequences(
                    [rollout.prompts[i] for i in part],
                    [rollout.responses[i] for i in part],
                    self.pad_id,
                    self.device,
                )
                found = self.critic(token_values, batch, before=True)
                if counts:
                    rows = torch.from_numpy(part).to(self.device)
                    values[rows, : found.shape[1]] = found
            all_reduce_sum(values)
        return rollout._replace(values=values)

    def _policy_scores(self, batch: SequenceBatch, responses: Sequence[Response]) -> ResponseScores:
        """What the policy says about responses: by a pass, or what it said when they were drawn."""
        if not self.sampled_logprobs:
            temperature = self.sampling.temperature
            return self.policy(response_logprobs, batch, temperature=temperature, drawn=True)
        logprobs = np.concatenate([response.logprobs for response in responses])
        spread = [response.entropy for response in responses if response.entropy is not None]
        entropy = np.concatenate(spread) if len(spread) == len(responses) else None
        return ResponseScores(
            batch.window(torch.from_numpy(logprobs).to(self.device)),
            None if entropy is None else batch.window(torch.from_numpy(entropy).to(self.device)),
        )


@contextmanager
def evaluating(*models: Any) -> Iterator[None]:
    """Hold models in evaluation mode inside: gradient checkpointing would switch the cache off."""
    before = [model.training for model in models]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for model, training in zip(models, before, strict=True):
            model.train(training)
