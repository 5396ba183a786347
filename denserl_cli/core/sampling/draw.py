"""Drawing tokens, with random numbers that belong to a response and not to its batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

BLOCK = 256
"""Tokens of the vocabulary whose probabilities are summed up together when one is drawn."""


class Drawn(NamedTuple):
    """Tokens that were drawn.

    ids: (R,). logprobs, entropy: (R,) float32, nats, of the tokens and of the distributions that
    they were drawn from.
    """

    ids: Tensor
    logprobs: Tensor
    entropy: Tensor


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


def draw(logits: Tensor, uniform: Tensor, *, temperature: float, top_p: float) -> Drawn:
    """Draw one token a row by inverting the cumulative distribution.

    Args:
        logits: (R, V).
        uniform: (R,) in [0, 1).
        temperature: Divides the logits; 0 takes the likeliest token.
        top_p: Probability of the likeliest tokens that are drawn from; 1 draws from all.

    """
    logits = logits.float()
    if temperature == 0:
        ids = logits.argmax(-1)
        certain = torch.zeros(ids.shape, device=ids.device)
        return Drawn(ids, certain, certain)
    if temperature != 1:
        logits = logits / temperature
    probabilities = torch.softmax(logits, dim=-1)
    if top_p < 1:
        ordered, order = probabilities.sort(dim=-1, descending=True)
        beyond = ordered.cumsum(-1) - ordered >= top_p
        probabilities = torch.zeros_like(ordered).scatter(-1, order, ordered.masked_fill(beyond, 0))
    mass = _block_mass(probabilities)
    ids = _inverted(probabilities, mass, uniform)
    total = mass.sum(1)
    chosen = probabilities.gather(1, ids[:, None])[:, 0] / total
    logprobs = chosen.log().float()
    # with p = e^z / Z: log p = z - log Z, H = log Z - sum p z, each over the kept tokens alone
    mean = torch.linalg.vecdot(probabilities, logits).double() / total
    drawn = logits.gather(1, ids[:, None])[:, 0].double()
    return Drawn(ids, logprobs, (drawn - chosen.log() - mean).float())


def _block_mass(probabilities: Tensor) -> Tensor:
    """The probability of each block of the vocabulary, the last one shorter: (R, N)."""
    count = probabilities.shape[1] // BLOCK
    whole = count * BLOCK
    parts = [probabilities[:, :whole].unflatten(1, (count, BLOCK)), probabilities[:, None, whole:]]
    return torch.cat([part.sum(-1, dtype=torch.float64) for part in parts], dim=1)


def _inverted(probabilities: Tensor, mass: Tensor, uniform: Tensor) -> Tensor:
    """The token at which each row's cumulative distribution passes its uniform number: (R,).

    First the block of tokens is found, then the token in it: so one block a row is summed up in
    float64, token by token, and not the whole vocabulary.
    """
    vocabulary, passed = probabilities.shape[1], mass.cumsum(1)
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
