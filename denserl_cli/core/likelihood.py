"""Log-probability and entropy streamed from hidden states: no (N, V) tensor is ever made.

The logits are computed tile by tile (some tokens by some of the vocabulary) in float32, because
bfloat16 logits err by up to 0.05 nat. Each tile is reduced, relative to the highest logit so far,
and overwritten while it is in the cache; the backward pass computes it again. Three numbers per
token are kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from denserl_cli.core.precision import bfloat16_is_fast, bfloat16_products

TILE_TOKENS = 512
"""Tokens in a tile of logits. Every tile reads the whole weight, so fewer tokens are slower."""
TILE_BYTES = 4 * 2**20
"""Most bytes of a tile, and of its block of the weight: two tiles and a block fit into a cache."""
CUDA_TILE_TOKENS = 4096
"""The same on CUDA, where every operation on a tile costs a kernel launch: few, large tiles."""
CUDA_TILE_BYTES = 256 * 2**20
"""The same on CUDA."""
_LOWEST = -1000.0
"""Shifted logits z are raised to this before e^z z: e^z is 0 there, and 0 * -inf would be NaN."""


def logprob_and_entropy(
    hidden: Tensor,
    lm_head_weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    with_entropy: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of each target and entropy of its distribution softmax(z / temperature).

    Differentiable in hidden and weight, once. The logits are float32 whatever the inputs: on CUDA
    the products are taken in the inputs' type (autocast's, where it is on), elsewhere in float32;
    a CPU that is fast at it multiplies bfloat16 inputs as they are, with float32 sums.

    Args:
        hidden: (N, H), the states that predict the targets.
        lm_head_weight: (V, H), no bias; logits are z = hidden @ weight.T.
        targets: (N,) int64. One outside the vocabulary has the log-probability NaN.
        temperature: Divides the logits.
        with_entropy: Compute entropies.

    Returns:
        (N,) log-probabilities and (N,) entropies (None without `with_entropy`), nats, float32
        (float64 from float64 inputs).
    """
    return _StreamedLikelihood.apply(hidden, lm_head_weight, targets, temperature, with_entropy)


class _StreamedLikelihood(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        temperature: float,
        with_entropy: bool,
    ) -> tuple[Tensor, Tensor | None]:
        head = _Head(hidden, weight, temperature)
        # with m the highest logit so far: sum_j e^(z_j - m) and sum_j e^(z_j - m) (z_j - m)
        total = torch.zeros(len(hidden), 1, dtype=head.dtype, device=hidden.device)
        moment, target = torch.zeros_like(total), torch.full_like(total, torch.nan)
        peak = torch.full_like(total, torch.finfo(head.dtype).min)
        for tile in head.tiles():
            rows, logits = tile.rows, tile.logits
            column, inside = tile.find(targets)
            target[rows] = torch.where(inside, logits.gather(1, column), target[rows])
            higher = torch.maximum(peak[rows], logits.amax(1, keepdim=True))
            drop = (peak[rows] - higher).clamp_(min=_LOWEST)
            shrink = drop.exp()
            peak[rows] = higher
            shifted = logits.sub_(higher)
            weights = torch.exp(shifted, out=tile.scratch)
            if with_entropy:
                moment[rows] = (moment[rows] + total[rows] * drop) * shrink
                shifted.clamp_(min=_LOWEST).mul_(weights)
                moment[rows] += shifted.sum(1, keepdim=True)
            total[rows] = total[rows] * shrink + weights.sum(1, keepdim=True)
        log_total = total.log()
        logprob = (target - peak - log_total)[:, 0]
        # H = log Z - sum_j p_j z_j
        entropy = (log_total - moment / total)[:, 0] if with_entropy else None
        ctx.save_for_backward(hidden, weight, targets, peak, total, entropy)
        ctx.temperature, ctx.operand = temperature, head.operand
        ctx.set_materialize_grads(False)
        return logprob, entropy

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_logprob: Tensor | None, grad_entropy: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        hidden, weight, targets, peak, total, entropy = ctx.saved_tensors
        head = _Head(hidden, weight, ctx.temperature, ctx.operand)
        if grad_logprob is None:
            grad_logprob = torch.zeros_like(total[:, 0])
        # d logprob / dz_j = [j = target] - p_j;  dH / dz_j = -p_j (log p_j + H)
        # with p_j = e^(z_j - m) / total, log p_j = z_j - m - log total
        on_target = grad_logprob[:, None] / ctx.temperature
        on_all, slope = -on_target / total, None
        if grad_entropy is not None:
            slope = -grad_entropy[:, None] / ctx.temperature / total
            on_all = on_all + slope * (entropy[:, None] - total.log())
        grad_hidden = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_hidden = torch.zeros(hidden.shape, dtype=head.dtype, device=hidden.device)
        if ctx.needs_input_grad[1]:
            grad_weight = torch.zeros_like(weight)
            block = torch.empty(head.width, weight.shape[1], dtype=head.dtype, device=hidden.device)
        for tile in head.tiles():
            rows = tile.rows
            shifted = tile.logits.sub_(peak[rows])
            grad_z = torch.exp(shifted, out=tile.scratch)
            if slope is None:
                grad_z.mul_(on_all[rows])
            else:
                grad_z.mul_(shifted.clamp_(min=_LOWEST).mul_(slope[rows]).add_(on_all[rows]))
            column, inside = tile.find(targets)
            grad_z.scatter_add_(1, column, on_target[rows] * inside)
            grad_z = grad_z.to(head.operand)
            if grad_hidden is not None:
                head.multiply(grad_z, tile.weight, grad_hidden[rows], add=True)
            if grad_weight is not None:  # summed over the tokens before it is rounded
                part = block[: len(tile.weight)]
                head.multiply(grad_z.t(), tile.states, part, add=rows.start > 0)
                if rows.stop >= len(hidden):
                    grad_weight[tile.columns] = part
        if grad_hidden is not None:
            grad_hidden = grad_hidden.to(hidden.dtype)
        return grad_hidden, grad_weight, None, None, None


class _Tile(NamedTuple):
    """Logits (n, k) of the n tokens in `rows` for the k of the vocabulary in `columns`."""

    rows: slice
    columns: slice
    states: Tensor  # (n, H), in the operands' type
    weight: Tensor  # (k, H), in the operands' type
    logits: Tensor
    scratch: Tensor  # as large as the logits

    def find(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Each target's column in the tile, (n, 1), clamped to it; and whether it is inside."""
        column = targets[self.rows, None] - self.columns.start
        width = self.logits.shape[1]
        return column.clamp(0, width - 1), (column >= 0) & (column < width)


class _Head:
    """The matrix products of the language-model head, with the right types of numbers."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        temperature: float,
        operand: torch.dtype | None = None,
    ) -> None:
        cuda = hidden.device.type == "cuda"
        promoted = torch.promote_types(hidden.dtype, weight.dtype)
        self.dtype = torch.promote_types(promoted, torch.float32)
        self.operand = operand or (_cuda_operand(promoted) if cuda else self.dtype)
        self.rounded = (
            not cuda and hidden.dtype == weight.dtype == torch.bfloat16 and bfloat16_is_fast()
        )
        self.states, self.weight = hidden.to(self.operand), weight
        self.temperature = temperature
        tokens, size = (CUDA_TILE_TOKENS, CUDA_TILE_BYTES) if cuda else (TILE_TOKENS, TILE_BYTES)
        self.tokens = max(1, min(tokens, len(hidden)))
        widest = size // (self.dtype.itemsize * max(self.tokens, weight.shape[1]))
        self.width = max(1, min(widest, len(weight)))

    def tiles(self) -> Iterator[_Tile]:
        """Yield the tempered logits, all tokens for one block of the vocabulary after another."""
        size = self.tokens * self.width
        buffers = torch.empty(2, size, dtype=self.dtype, device=self.states.device)
        for start in range(0, len(self.weight), self.width):
            columns = slice(start, start + self.width)
            weight = self.weight[columns].to(self.operand)
            for first in range(0, len(self.states), self.tokens):
                rows = slice(first, first + self.tokens)
                states = self.states[rows]
                n, k = len(states), len(weight)
                logits, scratch = (buffer[: n * k].view(n, k) for buffer in buffers)
                with bfloat16_products(self.rounded):
                    self.multiply(states, weight.t(), logits, add=False)
                if self.temperature != 1:
                    logits.div_(self.temperature)
                yield _Tile(rows, columns, states, weight, logits, scratch)

    def multiply(self, left: Tensor, right: Tensor, out: Tensor, *, add: bool) -> None:
        """Store left @ right in `out`, or add it; autocast does not change products with `out`."""
        if self.operand == self.dtype:
            out.addmm_(left, right, beta=int(add))
        elif add:  # CUDA: half operands, float32 result
            out.add_(torch.mm(left, right, out_dtype=self.dtype))
        else:
            torch.mm(left, right, out_dtype=self.dtype, out=out)


def _cuda_operand(promoted: torch.dtype) -> torch.dtype:
    """Type in which CUDA multiplies: autocast's where it is on, else that of the inputs."""
    return torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else promoted
