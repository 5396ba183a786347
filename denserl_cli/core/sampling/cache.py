"""A cache of keys and values with a place for each row, and the attention that reads it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.cache_utils import Cache, CacheLayerMixin

ATTENTION = "denserl_rows"
"""Name under which transformers' attention layers find `_attend`."""
STEP = 64
"""Attention reads a multiple of so many columns: kernels and graphs are made for few widths."""


class RowCache(Cache):
    """Keys and values of R rows, (R, heads, columns, size) for each layer, allocated once.

    Every row starts in column 0, whatever the others do, so a row can be replaced while the others
    go on. A model that is called with this cache reads one token a row; `ready` says where to.
    """

    def __init__(self, like: Sequence[tuple[Tensor, Tensor]], rows: int, columns: int) -> None:
        """Allocate the cache.

        Args:
            like: Keys and values of each layer as the model makes them, (rows, heads, columns,
                size) with any number of rows and columns.
            rows: R.
            columns: The most tokens of a row; rounded up to whole steps.
        """
        self.columns = -(-columns // STEP) * STEP
        self.held = [_Layer(self, *pair, rows, self.columns) for pair in like]
        super().__init__(layers=[*self.held])
        self.rows = rows
        self.places = torch.zeros(rows, dtype=torch.long, device=like[0][0].device)
        self.active = self.width = 0
        self.masks: dict[int | None, Tensor] = {}

    @staticmethod
    def row_bytes(like: Sequence[tuple[Tensor, Tensor]], columns: int) -> int:
        """Bytes of one row."""
        tokens = -(-columns // STEP) * STEP
        return sum(
            tokens * part.shape[1] * part.shape[3] * part.element_size()
            for pair in like
            for part in pair
        )

    def ready(self, places: Tensor, width: int) -> None:
        """Prepare a pass over one token of each of the first rows.

        Args:
            places: (n,) the column of each row's token.
            width: Columns that attention reads; more than any place.
        """
        self.places, self.active, self.width = places, len(places), width
        self.masks.clear()

    def mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """(n, 1, 1, width), 0 where a row's token sees a column and -inf elsewhere.

        Args:
            window: The most columns that a token sees, its own among them; None: all.
            dtype: Of the mask.
        """
        if window not in self.masks:
            column = torch.arange(self.width, device=self.places.device)
            place = self.places[:, None]
            seen = column <= place
            if window is not None:
                seen = seen & (column > place - window)
            empty = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
            self.masks[window] = empty.masked_fill_(~seen, -torch.inf)[:, None, None]
        return self.masks[window]

    def fill(self, start: int, parts: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Store keys and values of whole prompts, (k, heads, columns, size), in rows from start."""
        for layer, pair in zip(self.held, parts, strict=True):
            for held, part in zip((layer.keys, layer.values), pair, strict=True):
                held[start : start + len(part), :, : part.shape[2]] = part

    def move(self, source: Tensor, target: Tensor, width: int) -> None:
        """Copy the first columns of some rows to other rows."""
        for layer in self.held:
            for held in (layer.keys, layer.values):
                held[target, :, :width] = held[source, :, :width]


class _Layer(CacheLayerMixin):
    """Keys and values of one layer."""

    keys: Tensor
    values: Tensor

    def __init__(
        self, cache: RowCache, keys: Tensor, values: Tensor, rows: int, columns: int
    ) -> None:
        super().__init__()
        self.cache = cache
        # zeros: what a mask hides is still multiplied, by 0
        self.keys, self.values = (
            part.new_zeros(rows, part.shape[1], columns, part.shape[3]) for part in (keys, values)
        )
        self.numbers = torch.arange(rows, device=keys.device)
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: the cache is there."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store one token a row; returns what attention reads."""
        count, width = self.cache.active, self.cache.width
        rows, places = self.numbers[:count], self.cache.places
        self.keys[rows, :, places] = key_states[:, :, 0]
        self.values[rows, :, places] = value_states[:, :, 0]
        return self.keys[:count, :, :width], self.values[:count, :, :width]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns that attention reads, from the first one on."""
        return self.cache.width, 0

    def get_seq_length(self) -> int:
        """Columns before the last one that attention reads."""
        return self.cache.width - 1

    def get_max_length(self) -> int:
        """The most tokens of a row."""
        return self.cache.columns


_reading: list[RowCache] = []
"""The cache that the pass in progress reads: transformers hands attention no cache, and no mask."""


@contextmanager
def reading(model: Any, cache: RowCache) -> Iterator[None]:
    """Let a model's attention layers read a row cache inside."""
    AttentionInterface.register(ATTENTION, _attend)
    config = model.config
    before = config._attn_implementation
    config._attn_implementation = ATTENTION
    _reading.append(cache)
    try:
        yield
    finally:
        _reading.pop()
        config._attn_implementation = before


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention of one token a row, (n, heads, 1, size), in the interface of transformers.

    The query heads that share keys stand as so many tokens beside each other, so nothing is
    repeated.
    """
    rows, heads, _, size = query.shape
    mask = _reading[-1].mask(sliding_window, query.dtype)
    grouped = query.view(rows, key.shape[1], heads // key.shape[1], size)
    if softcap is None:
        out = scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=scaling)
    else:
        scale = size**-0.5 if scaling is None else scaling
        scores = softcap * torch.tanh(grouped @ key.transpose(2, 3) * (scale / softcap))
        weights = torch.softmax(scores + mask, dim=-1, dtype=torch.float32)
        out = weights.to(value.dtype) @ value
    return out.reshape(rows, 1, heads, -1), None
