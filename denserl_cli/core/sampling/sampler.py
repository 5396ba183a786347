"""The face of sampling: prompts and keys in, responses out, whatever engine draws them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from denserl_cli.core.sampling.base import Progress, Request, Response, Sampling, SamplingEngine
from denserl_cli.core.sampling.torch_engine import TorchSampling
from denserl_cli.core.system.distributed import all_gather_object, rank, world_size

if TYPE_CHECKING:
    from denserl_cli.core.engine.base import Engine
    from denserl_cli.core.engine.frozen import LocalModel
    from denserl_cli.core.recipe.schema import PPOConfig, Recipe, RolloutConfig


class Sampler:
    """Samples responses; each process draws its share, and all of them get everything."""

    def __init__(self, engine: SamplingEngine) -> None:
        self.engine = engine

    @property
    def exact(self) -> bool:
        """Whether log-probabilities equal the trainer's but for rounding, where top_p is 1."""
        return self.engine.exact

    def refresh(self) -> None:
        """Take the policy's present weights: before the first sample and after every update."""
        self.engine.refresh()

    def sample(
        self,
        prompts: Sequence[np.ndarray],
        keys: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        limits: Sequence[int] | None = None,
        progress: Progress = lambda _: None,
    ) -> list[Response]:
        """Sample one response for each prompt.

        Args:
            prompts: Ids of the R prompts.
            keys: The key of each response, from which its randomness comes.
            sampling: How tokens are drawn.
            limits: (R,), the most tokens of each response; None: max_new_tokens for all.
            progress: Called with the number of responses that have just been sampled.

        Returns:
            The responses in the order of the prompts.
        """
        limits = limits or [sampling.max_new_tokens] * len(prompts)
        requests = [
            Request(prompt, tuple(key), limit)
            for prompt, key, limit in zip(prompts, keys, limits, strict=True)
        ]
        ranks = world_size()
        longest_first = sorted(range(len(requests)), key=lambda i: -len(requests[i].prompt))
        mine = longest_first[rank() :: ranks]
        drawn = self.engine.sample(
            [requests[i] for i in mine],
            sampling,
            lambda count: progress(count * ranks),  # the others are about as far
        )
        everywhere = all_gather_object(dict(zip(mine, drawn, strict=True)))
        found = {i: response for theirs in everywhere for i, response in theirs.items()}
        return [found[i] for i in range(len(requests))]

    def close(self) -> None:
        """End what the engine has started; the sampler is not used afterwards."""
        self.engine.close()


def make_sampler(
    recipe: Recipe, policy: Engine | LocalModel, *, pad_id: int, max_length: int
) -> Sampler:
    """The sampler that the recipe's `ppo.rollout` names.

    Args:
        recipe: Says which engine, and its settings.
        policy: What responses are sampled from.
        pad_id: Token that fills batches up.
        max_length: The most tokens of a prompt and its response together.
    """
    return Sampler(TorchSampling(policy, rows=recipe.ppo.rollout.rows, pad_id=pad_id))


def takes_sampled_logprobs(ppo: PPOConfig, sampler: Sampler) -> bool:
    """Whether PPO's old log-probabilities are the sampler's, and not those of one more pass."""
    if ppo.rollout.old_logprobs == "auto":
        return sampler.exact and ppo.rollout.top_p == 1 and ppo.epochs == 1
    return ppo.rollout.old_logprobs == "sampled"


def sampling_of(rollout: RolloutConfig, stop_ids: tuple[int, ...]) -> Sampling:
    """How a recipe's rollouts are drawn.

    Args:
        rollout: Of the recipe.
        stop_ids: Tokens that end a response.
    """
    return Sampling(rollout.max_new_tokens, stop_ids, rollout.temperature, rollout.top_p)
