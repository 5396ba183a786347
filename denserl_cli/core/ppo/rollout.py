"""One rollout: sample responses, then measure everything that the update needs on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from denserl_cli.core.data.batches import by_length, collate_sequences, micro_batches
from denserl_cli.core.models.causal_lm import response_logprobs
from denserl_cli.core.models.device import autocast
from denserl_cli.core.models.scalar_head import token_values
from denserl_cli.core.observer import timed
from denserl_cli.core.ppo.sampling import Response, Sampling, noise, sample
from denserl_cli.core.system.distributed import (
    all_gather_object,
    all_reduce_sum,
    rank,
    shard_micro_batches,
    world_size,
)

if TYPE_CHECKING:
    from denserl_cli.core.engine.base import Engine
    from denserl_cli.core.engine.frozen import LocalModel
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
        policy_entropy: Nats, of the distribution that the policy drew each token from.
        reference_logprobs: Nats, of the reference.
        entropy: Nats, of the reference after each token.
        values: The critic's, in the state before each token.
        token_values: The reward model's at each token; None without one.
        ends: bool, of the segments.
        measured: What sources of rewards asked for beyond that, (R, T) or (R,), by the model that
            it is of (empty: the run's reward model) and by name.
    """

    prompts: list[np.ndarray]
    responses: list[np.ndarray]
    terminated: Tensor
    response_mask: Tensor
    logprobs: Tensor
    policy_entropy: Tensor
    reference_logprobs: Tensor
    entropy: Tensor
    values: Tensor
    token_values: Tensor | None
    ends: Tensor
    measured: Mapping[tuple[str, str], Tensor] = MappingProxyType({})

    @property
    def tokens(self) -> int:
        """Tokens of all prompts and responses."""
        return sum(len(ids) for ids in (*self.prompts, *self.responses))


class Collector:
    """Makes rollouts with a policy, a critic, and the frozen reference and reward model."""

    def __init__(
        self,
        *,
        policy: Engine | LocalModel,
        critic: Engine | LocalModel | None = None,
        scorer: Scorer,
        sampling: Sampling,
        micro_batch_size: int,
        pad_id: int,
    ) -> None:
        """Set up a collector.

        Args:
            policy: Samples the responses.
            critic: Without one the values stay 0.
            scorer: Reference and reward model.
            sampling: How tokens are drawn.
            micro_batch_size: Responses that are sampled, or scored, together.
            pad_id: Token that fills batches up.
        """
        self.policy, self.critic, self.scorer = policy, critic, scorer
        self.sampling, self.micro_batch_size = sampling, micro_batch_size
        self.pad_id = pad_id
        self.device = policy.device
        self.seconds: dict[str, float] = {}
        """Wall time of the two phases of the latest rollout."""

    @torch.no_grad()
    def collect(
        self,
        prompts: Sequence[np.ndarray],
        keys: Sequence[Sequence[int]],
        progress: Callable[[int], None] = lambda _: None,
    ) -> Rollout:
        """Sample one response for each prompt and score all of them.

        Args:
            prompts: Ids of each prompt.
            keys: The key of each response, from which its randomness comes (see `noise`).
            progress: Called with the number of responses that have just been sampled.
        """
        models = [held.model for held in (self.policy, self.critic) if held is not None]
        with evaluating(*models):
            with timed(self.seconds, "rollout_seconds"):
                responses = self.sample(prompts, keys, progress)
            with timed(self.seconds, "scoring_seconds"), self.scorer.on_device():
                return self.score(prompts, responses)

    def sample(
        self,
        prompts: Sequence[np.ndarray],
        keys: Sequence[Sequence[int]],
        progress: Callable[[int], None] = lambda _: None,
    ) -> list[Response]:
        """Responses in the order of the prompts, drawn in batches of similar prompt length.

        Args:
            prompts: As in `collect`.
            keys: As in `collect`.
            progress: As in `collect`.
        """
        uniform = noise(keys, self.sampling.max_new_tokens)
        responses: list[Response | None] = [None] * len(prompts)
        lengths = [len(prompt) for prompt in prompts]
        parts = by_length(lengths, np.arange(len(prompts)), self.micro_batch_size)
        with self.policy.gathered() as policy:
            for part in parts[rank() :: world_size()]:  # no collective call: gathered once for all
                with autocast(self.device, self.policy.compute_dtype):
                    drawn = sample(
                        policy,
                        [prompts[i] for i in part],
                        self.sampling,
                        uniform[torch.from_numpy(part)],
                        self.pad_id,
                    )
                for i, response in zip(part, drawn, strict=True):
                    responses[i] = response
                progress(len(part) * world_size())  # the others are about as far
        for theirs in all_gather_object([(i, r) for i, r in enumerate(responses) if r is not None]):
            for i, response in theirs:
                responses[i] = response
        return [response for response in responses if response is not None]

    def score(self, prompts: Sequence[np.ndarray], responses: Sequence[Response]) -> Rollout:
        """One pass of each model over the responses, in batches of similar length."""
        shape = (len(responses), max(len(response.ids) for response in responses))
        names = ["logprobs", "policy_entropy", "reference_logprobs", "entropy", "values"]
        names += ["token_values"] if self.scorer.reward_model is not None else []
        columns = {name: torch.zeros(shape, device=self.device) for name in names}
        further: dict[tuple[str, str], Tensor] = {}
        mask, ends = (torch.zeros(shape, dtype=torch.bool, device=self.device) for _ in "me")
        terminated = torch.tensor([r.terminated for r in responses], device=self.device)
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
            policy = self.policy(response_logprobs, batch, temperature=temperature, drawn=True)
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
            token_values=columns.pop("token_values", None),
            measured=further,
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
