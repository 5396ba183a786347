"""Sampling with the policy itself, in this process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from denserl_cli.core.data.batches import by_length
from denserl_cli.core.models.device import autocast
from denserl_cli.core.sampling.base import Progress, Request, Response, Sampling
from denserl_cli.core.sampling.draw import draw, noise

if TYPE_CHECKING:
    from denserl_cli.core.engine.base import Engine
    from denserl_cli.core.engine.frozen import LocalModel

ROWS = 64
"""Responses that are sampled side by side where a recipe does not say it."""


class TorchSampling:
    """Samples from a policy that this process trains or holds; needs no copy of its weights."""

    def __init__(self, policy: Engine | LocalModel, *, rows: int | None, pad_id: int) -> None:
        """Set up the engine.

        Args:
            policy: What responses are sampled from.
            rows: Responses that are sampled side by side; None: `ROWS`.
            pad_id: Token that fills batches up.
        """
        self.policy, self.rows, self.pad_id = policy, rows or ROWS, pad_id
        self.exact = policy.compute_dtype is torch.float32

    def refresh(self) -> None:
        """Do nothing: the weights are the policy's own."""

    def sample(
        self, requests: Sequence[Request], sampling: Sampling, progress: Progress
    ) -> list[Response]:
        """The responses in the order of the requests."""
        found: dict[int, Response] = {}
        lengths = [len(request.prompt) for request in requests]
        parts = by_length(lengths, np.arange(len(requests)), self.rows)
        with self.policy.gathered() as model:  # once for all: no collective call inside
            training = model.training
            model.eval()  # gradient checkpointing would switch the cache off
            try:
                for part in parts:
                    with autocast(self.policy.device, self.policy.compute_dtype):
                        drawn = _sample(model, [requests[i] for i in part], sampling, self.pad_id)
                    found |= zip(part.tolist(), drawn, strict=True)
                    progress(len(part))
            finally:
                model.train(training)
        return [found[i] for i in range(len(requests))]

    def close(self) -> None:
        """Do nothing: nothing was started."""


@torch.no_grad()
def _sample(
    policy: Any, requests: Sequence[Request], sampling: Sampling, pad_id: int
) -> list[Response]:
    """Sample one response for each request; rows that have ended leave the batch."""
    from transformers import DynamicCache

    device = policy.device
    ids, mask, positions = _left_padded([request.prompt for request in requests], pad_id, device)
    uniform = noise([request.key for request in requests], sampling.max_new_tokens).to(device)
    stops = torch.tensor(sampling.stop_ids, device=device)
    rows = torch.arange(len(requests), device=device)
    tokens = torch.full((len(requests), sampling.max_new_tokens), pad_id, device=device)
    logprobs = torch.zeros(tokens.shape, device=device)
    lengths = torch.tensor([request.limit for request in requests], device=device)
    terminated = torch.zeros(len(requests), dtype=torch.bool, device=device)
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
        token, logprob = draw(
            logits, uniform[rows, step], temperature=sampling.temperature, top_p=sampling.top_p
        )
        tokens[rows, step], logprobs[rows, step] = token, logprob
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
    return [
        Response(row[:length].astype(np.int32), ended, certain[:length])
        for row, length, ended, certain in zip(
            tokens.cpu().numpy(),
            lengths.tolist(),
            terminated.tolist(),
            logprobs.cpu().numpy(),
            strict=True,
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
