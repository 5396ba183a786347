"""Sampling in padded batches, for models that take no attention function from outside."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from denserl_cli.core.sampling.base import Request, Response, Sampling
from denserl_cli.core.sampling.draw import draw, noise


@torch.no_grad()
def sample_padded(
    model: Any, requests: Sequence[Request], sampling: Sampling, pad_id: int
) -> list[Response]:
    """Sample one response for each request, in one batch; rows that have ended leave it.

    Args:
        model: A causal language model with all weights in place.
        requests: The responses that are wanted.
        sampling: How tokens are drawn.
        pad_id: Token that fills the batch up.

    Returns:
        The responses in the order of the requests.
    """
    from transformers import DynamicCache

    device = model.device
    ids, mask, positions = _left_padded([request.prompt for request in requests], pad_id, device)
    uniform = noise([request.key for request in requests], sampling.max_new_tokens).to(device)
    stops = torch.tensor(sampling.stop_ids, device=device)
    rows = torch.arange(len(requests), device=device)
    tokens = torch.full((len(requests), sampling.max_new_tokens), pad_id, device=device)
    logprobs, entropy = torch.zeros(2, *tokens.shape, device=device)
    lengths = torch.tensor([request.limit for request in requests], device=device)
    terminated = torch.zeros(len(requests), dtype=torch.bool, device=device)
    cache = DynamicCache(config=model.config)
    for step in range(sampling.max_new_tokens):
        logits = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        token, logprob, spread = draw(
            logits, uniform[rows, step], temperature=sampling.temperature, top_p=sampling.top_p
        )
        tokens[rows, step], logprobs[rows, step] = token, logprob
        entropy[rows, step] = spread
        stopped = torch.isin(token, stops)
        terminated[rows[stopped]] = True
        lengths[rows[stopped]] = step + 1
        going = lengths[rows] > step + 1
        if not going.all():
            rows, token, mask = rows[going], token[going], mask[going]
            positions = positions[going]
            if not len(rows):
                break
            cache.batch_select_indices(going.nonzero()[:, 0])
        ids = token[:, None]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        positions = positions[:, -1:] + 1
    drawn_ids, certain, uncertain = (held.cpu().numpy() for held in (tokens, logprobs, entropy))
    return [
        Response(
            drawn_ids[row, :length].astype(np.int32),
            ended,
            certain[row, :length],
            uncertain[row, :length],
        )
        for row, (length, ended) in enumerate(
            zip(lengths.tolist(), terminated.tolist(), strict=True)
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
