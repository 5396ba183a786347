"""Passes of a language model for sampling: whole prompts, then one token a row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear
from transformers import DynamicCache

from denserl_cli.core.sampling.cache import STEP, RowCache, reading

Layers = list[tuple[Tensor, Tensor]]


class Decoder:
    """A model with all weights in place, which reads prompts and then one token after another."""

    def __init__(self, model: Any) -> None:
        self.model, self.body, self.device = model, model.base_model, model.device
        self.head = Head(model.get_output_embeddings().weight)
        self.like: Layers = []
        """Keys and values of each layer as the model makes them, for their shapes."""

    def read(self, prompts: Sequence[np.ndarray]) -> tuple[Tensor, Layers]:
        """Read prompts from their first token on.

        Args:
            prompts: Ids of the k prompts.

        Returns:
            (k, H) the hidden states at their last tokens, and the keys and values of each layer,
            (k, heads, S, size) with S the length of the longest prompt.
        """
        lengths = np.array([*map(len, prompts)])
        ids = np.zeros((len(prompts), lengths.max()), np.int64)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = prompt
        cache: Any = (
            DynamicCache()
        )  # without the configuration: layers with a window keep all columns
        # no token sees those after it, so padding on the right needs no mask
        states = self.body(
            input_ids=torch.from_numpy(ids).to(self.device), past_key_values=cache, use_cache=True
        ).last_hidden_state
        last = torch.from_numpy(lengths - 1).to(self.device)
        rows = torch.arange(len(prompts), device=self.device)
        return states[rows, last], [(layer.keys, layer.values) for layer in cache.layers]

    def advance(self, cache: RowCache, tokens: Tensor, places: Tensor, width: int) -> Tensor:
        """Read one token of each of the first n rows of a cache.

        Args:
            cache: Holds the tokens before.
            tokens: (n,).
            places: (n,) the column, which is also the position, of each token.
            width: Columns that attention reads.

        Returns:
            (n, H) hidden states.
        """
        cache.ready(places, width)
        with reading(self.model, cache):
            states = self.body(
                input_ids=tokens[:, None],
                position_ids=places[:, None],
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state
        return states[:, 0]

    def can_advance(self) -> bool:
        """Whether one token after another gives what a whole sequence does.

        False for models whose attention layers do not take another attention function.
        """
        if not getattr(self.model, "_supports_attention_backend", False):
            return False
        vocabulary = self.model.get_input_embeddings().weight.shape[0]
        ids = np.arange(1, 8) * vocabulary // 8  # words, not the special ids at either end
        expected, _ = self.read([ids, ids[:3]])
        _, self.like = self.read([ids[:5], ids[:2]])
        cache = RowCache(self.like, rows=2, columns=8)
        cache.fill(0, self.like)
        for step in range(2):
            places = torch.tensor([5 + step, 2], device=self.device)
            found = self.advance(cache, torch.from_numpy(ids).to(self.device)[places], places, STEP)
        error = (found - expected).float().norm(dim=1) / expected.float().norm(dim=1)
        tolerance = 1e-3 if expected.dtype is torch.float32 else 0.3
        return bool((error <= tolerance).all())


class Head:
    """The language-model head, with float32 logits from hidden states of any type.

    Products of bfloat16 numbers are summed up in float32 and not rounded, which hardware for
    bfloat16 does as fast.
    """

    def __init__(self, weight: Tensor) -> None:
        self.half = weight.dtype is not torch.float32
        self.weight = weight if weight.is_cuda else weight.float()

    def __call__(self, states: Tensor) -> Tensor:
        """(n, V) float32 logits of hidden states (n, H)."""
        if not self.half:
            return linear(states.float(), self.weight)
        if self.weight.is_cuda:
            return torch.mm(states.to(self.weight.dtype), self.weight.t(), out_dtype=torch.float32)
        with _bfloat16_products():
            return linear(states.float(), self.weight)


@contextmanager
def _bfloat16_products() -> Iterator[None]:
    """Let float32 products on the CPU take their factors in bfloat16, which these are already."""
    settings: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


@contextmanager
def weights_in(model: Any, dtype: torch.dtype) -> Iterator[None]:
    """Hold float32 weights in the compute type inside: copies made once, not at each token."""
    kept = {}
    if dtype is not torch.float32:
        kept = {p: p.data for p in model.parameters() if p.dtype is torch.float32}
    for weight, master in kept.items():
        weight.data = master.to(dtype)
    try:
        yield
    finally:
        for weight, master in kept.items():
            weight.data = master
