"""What is sampled, and the interface of the engines that do it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np

Progress = Callable[[int], None]
"""Called with the number of responses that have just been finished."""


class Sampling(NamedTuple):
    """How responses are drawn; temperature 0 takes the likeliest token.

    `stop_ids` end a response and belong to it. `max_new_tokens` bounds every response.
    """

    max_new_tokens: int
    stop_ids: tuple[int, ...]
    temperature: float = 1.0
    top_p: float = 1.0


class Request(NamedTuple):
    """A response that is wanted.

    prompt: ids. key: integers from which the response's randomness comes, such as (seed, iteration,
    prompt, sample). limit: the most tokens of the response, at most `Sampling.max_new_tokens`.
    """

    prompt: np.ndarray
    key: tuple[int, ...]
    limit: int


class Response(NamedTuple):
    """A sampled response of T tokens.

    ids: (T,) int32, terminator included. terminated: whether it ended by itself. logprobs: (T,)
    float32, in nats, of each token under the distribution that it was drawn from, temperature and
    top_p applied. entropy: (T,) float32, in nats, of these distributions; None where an engine does
    not know it.
    """

    ids: np.ndarray
    terminated: bool
    logprobs: np.ndarray
    entropy: np.ndarray | None = None


class SamplingEngine(Protocol):
    """Samples the responses that fall to this process; other processes have engines of their own.

    Attributes:
        exact: Whether log-probabilities equal the trainer's but for the rounding of float32, where
            top_p is 1.
    """

    exact: bool

    def refresh(self) -> None:
        """Take the policy's present weights; every process calls it at the same time."""

    def sample(
        self, requests: Sequence[Request], sampling: Sampling, progress: Progress
    ) -> list[Response]:
        """The responses in the order of the requests, of which there may be none.

        Every process calls it at the same time, with requests of its own.
        """

    def close(self) -> None:
        """End what the engine has started; it is not used afterwards."""
