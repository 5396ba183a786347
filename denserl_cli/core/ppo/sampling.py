"""Sampling of responses, with random numbers that belong to a response and not to its batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

BLOCK = 256
"""Tokens of the vocabulary whose probabilities are summed up together when one is drawn."""


class Sampling(NamedTuple):
    """How responses are drawn; temperature 0 takes the likeliest token.

    `stop_ids` end a response and belong to it.
    """

    max_new_tokens: int
    stop_ids: tuple[int, ...]
    temperature: float = 1.0
    top_p: float = 1.0


class Response(NamedTuple):
    """A sampled response.

    ids: its tokens, terminator included. terminated: whether it ended by itself.
    """

    ids: np.ndarray
    terminated: bool


def noise(keys: Sequence[Sequence[int]], tokens: int) -> Tensor:
    """Uniform random numbers for sampling.

    A key such as (seed, iteration, prompt, sample) belongs to one response, so neither the batch
    nor the process in which a response is drawn changes it (method §5).

    Args:
        keys: The key of each of the R responses.
        tokens: The most tokens of a response.

    Returns:
        (R, tokens), float64.
    """
    rows = [np.random.default_rng(list(key)).random(tokens) for key in keys]
    return torch.from_numpy(np.stack(rows))


def draw(logits: Tensor, uniform: Tensor, *, temperature: float, top_p: float) -> Tensor:
    """Draw one token a row by inverting the cumulative distribution.

    Args:
        logits: (R, V).
        uniform: (R,) in [0, 1).
        temperature: Divides the logits; 0 takes the likeliest token.
        top_p: Probability of the likeliest tokens that are drawn from; 1 draws from all.

    Returns:
        (R,) ids.
    """
    if temperature == 0:
        return logits.float().argmax(-1)
    probabilities = torch.softmax(logits.float() / temperature, dim=-1)
    if top_p < 1:
        ordered, order = probabilities.sort(dim=-1, descending=True)
        beyond = ordered.cumsum(-1) - ordered >= top_p
        probabilities = torch.zeros_like(ordered).scatter(-1, order, ordered.masked_fill(beyond, 0))
    return _inverted(probabilities, uniform)


def _inverted(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """The token at which each row's cumulative distribution passes its uniform number: (R,).

    First the block of tokens is found, then the token in it: so one block a row is summed up in
    float64, token by token, and not the whole vocabulary.
    """
    vocabulary = probabilities.shape[1]
    count = vocabulary // BLOCK
    whole = count * BLOCK
    parts = [probabilities[:, :whole].unflatten(1, (count, BLOCK)), probabilities[:, None, whole:]]
    mass = torch.cat([part.sum(-1, dtype=torch.float64) for part in parts], dim=1)
    passed = mass.cumsum(1)
    target = _below(uniform.to(mass)[:, None] * passed[:, -1:], passed)
    block = torch.searchsorted(passed, target, right=True)
    block = block.clamp(max=mass.shape[1] - 1)  # NaN logits: the rewards will be NaN and raise
    tokens = block * BLOCK + torch.arange(BLOCK, device=block.device)
    inside = probabilities.gather(1, tokens.clamp(max=vocabulary - 1)).double()
    inside = inside.masked_fill_(tokens >= vocabulary, 0).cumsum(1)
    left = _below(target - (passed - mass).gather(1, block), inside)
    index = torch.searchsorted(inside, left, right=True).clamp(max=BLOCK - 1)
    return tokens.gather(1, index)[:, 0].clamp(max=vocabulary - 1)


def _below(target: Tensor, cumulative: Tensor) -> Tensor:
    """The target, kept just below the total: rounding must not draw a token of probability 0."""
    return torch.minimum(target, cumulative[:, -1:] * (1 - 1e-12))


@torch.no_grad()
def sample(
    policy: Any,
    prompts: Sequence[np.ndarray],
    sampling: Sampling,
    uniform: Tensor,
    pad_id: int,
    *,
    limits: Sequence[int] | None = None,
) -> list[Response]:
    """Sample one response for each prompt; rows that have ended leave the batch.

    Args:
        policy: A causal language model with all weights in place.
        prompts: Ids of the R prompts.
        sampling: How tokens are drawn.
        uniform: (R, max_new_tokens), the random numbers of each row (see `noise`).
        pad_id: Token that fills batches up.
        limits: (R,), the most tokens of each response; None: max_new_tokens for all.

    Returns:
        The responses in the order of the prompts.
    """
    from transformers import DynamicCache

    device = policy.device
    ids, mask, positions = _left_padded(prompts, pad_id, device)
    uniform = uniform.to(device)
    stops = torch.tensor(sampling.stop_ids, device=device)
    rows = torch.arange(len(prompts), device=device)
    tokens = torch.full((len(prompts), sampling.max_new_tokens), pad_id, device=device)
    limits = limits or [sampling.max_new_tokens] * len(prompts)
    lengths = torch.tensor(limits, device=device)
    terminated = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    cache = DynamicCache(config=policy.config)
    for step in range(sampling.max_new_tokens):
        logits = policy(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        token = draw(
            logits, uniform[rows, step], temperature=sampling.temperature, top_p=sampling.top_p
        )
        tokens[rows, step] = token
        stopped = torch.isin(token, stops)
        terminated[rows[stopped]] = True
        lengths[rows[stopped]] = step + 1
        going = lengths[rows] > step + 1
        if not going.all():
            rows, token, mask = rows[going], token[going], mask[going]
            positions = positions[going]
            if not len(rows):
                break
            # states of linear attention as well
            cache.reorder_cache(going.nonzero()[:, 0])  # type: ignore[arg-type]
        ids = token[:, None]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        positions = positions[:, -1:] + 1
    return [
        Response(row[:length].astype(np.int32), ended)
        for row, length, ended in zip(
            tokens.cpu().numpy(), lengths.tolist(), terminated.tolist(), strict=True
        )
    ]


def _left_padded(
    prompts: Sequence[np.ndarray], pad_id: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, attention mask and positions of prompts that end in one column: (R, S) each."""
    width = max(map(len, prompts))
    ids = np.full((len(prompts), width), pad_id, np.int64)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = prompt
    lengths = np.array([*map(len, prompts)])
    positions = np.arange(width) - (width - lengths)[:, None]
    arrays = (ids, positions >= 0, np.maximum(positions, 0))
    first, second, third = (torch.from_numpy(array).to(device) for array in arrays)
    return first, second, third
