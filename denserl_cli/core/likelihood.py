"""Log-probability and entropy streamed from hidden states: no (N, V) tensor is ever made.

Chunk by chunk the logits are computed in float32 (bfloat16 logits err by up to 0.05 nat), reduced
and overwritten; the backward pass computes them again. What is kept is two numbers per token.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_BYTES = 32 * 2**20
"""Size of one chunk of logits; two such buffers are in use at a time."""
CUDA_CHUNK_BYTES = 256 * 2**20
"""The same on CUDA, where each chunk reads the whole weight: fewer, larger chunks."""
BLOCK_BYTES = 4 * 2**20
"""Size of one upcast block of the weight: small enough for the cache and to be reused by malloc."""
_LOWEST = -1000.0
"""Log-probabilities are raised to this before p log p: exp is 0 below, and 0 * inf is not."""


def logprob_and_entropy(
    hidden: Tensor,
    lm_head_weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    with_entropy: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of each target and entropy of its distribution softmax(z / temperature).

    hidden: (N, H), the states that predict the targets. lm_head_weight: (V, H), no bias; logits are
    z = hidden @ weight.T. targets: (N,) int64. Returns (N,) log-probabilities and (N,) entropies
    (None without `with_entropy`), nats, float32 (float64 from float64 inputs). Differentiable in
    hidden and weight, once. The logits are float32 whatever the inputs: on CUDA the products are
    taken in the inputs' type (autocast's, where it is on), elsewhere in float32.
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
        logsumexp = torch.empty(len(hidden), dtype=head.dtype, device=hidden.device)
        logprob = torch.empty_like(logsumexp)
        entropy = torch.empty_like(logsumexp) if with_entropy else None
        for rows, logits, scratch in head.chunks(hidden):
            peak = logits.amax(1, keepdim=True)
            shifted = logits.sub_(peak)
            target = shifted.gather(1, targets[rows, None])[:, 0]
            weights = torch.exp(shifted, out=scratch)
            total = weights.sum(1)
            log_total = total.log()
            logprob[rows] = target - log_total
            logsumexp[rows] = peak[:, 0] + log_total
            if entropy is not None:
                # H = log Z - sum_j p_j z_j
                finite = shifted.clamp_(min=_LOWEST)
                entropy[rows] = log_total - finite.mul_(weights).sum(1) / total
        ctx.save_for_backward(hidden, weight, targets, logsumexp, entropy)
        ctx.temperature, ctx.operand = temperature, head.operand
        ctx.set_materialize_grads(False)
        return logprob, entropy

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_logprob: Tensor | None, grad_entropy: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        hidden, weight, targets, logsumexp, entropy = ctx.saved_tensors
        head = _Head(hidden, weight, ctx.temperature, ctx.operand)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = torch.zeros(weight.shape, dtype=head.dtype, device=weight.device)
        if grad_logprob is None:
            grad_logprob = torch.zeros_like(logsumexp)
        grad_logprob = grad_logprob / ctx.temperature
        if grad_entropy is not None:
            grad_entropy = grad_entropy / ctx.temperature
        for rows, logits, scratch in head.chunks(hidden):
            log_p = logits.sub_(logsumexp[rows, None])
            p = torch.exp(log_p, out=scratch)
            # d logprob / dz_j = [j = target] - p_j;  dH / dz_j = -p_j (log p_j + H)
            grad_z = p.neg_()
            on_target = grad_logprob[rows, None]
            if grad_entropy is None:
                grad_z.mul_(on_target)
            else:
                slope = (
                    log_p.clamp_(min=_LOWEST)
                    .add_(entropy[rows, None])
                    .mul_(grad_entropy[rows, None])
                )
                grad_z.mul_(slope.add_(on_target))
            grad_z.scatter_add_(1, targets[rows, None], on_target)
            grad_states = None if grad_hidden is None else grad_hidden[rows]
            head.backward(grad_z, hidden[rows], grad_states, grad_weight)
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, None, None, None


class _Head:
    """The matrix products of the LM head, with operands and results of the right types."""

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
        self.temperature = temperature
        self.operand = operand or (_cuda_operand(promoted) if cuda else self.dtype)
        self.weight = weight.to(self.operand) if cuda else weight
        self.chunk_bytes = CUDA_CHUNK_BYTES if cuda else CHUNK_BYTES

    def chunks(self, hidden: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yield row slices with their tempered logits and a scratch buffer, both (rows, V)."""
        count, vocabulary = len(hidden), len(self.weight)
        size = max(1, min(count, self.chunk_bytes // (vocabulary * self.dtype.itemsize)))
        buffer = torch.empty(size, vocabulary, dtype=self.dtype, device=hidden.device)
        spare = torch.empty_like(buffer)
        for start in range(0, count, size):
            rows = slice(start, min(start + size, count))
            states = hidden[rows].to(self.operand)
            logits, scratch = buffer[: len(states)], spare[: len(states)]
            for columns, block in self._blocks():
                self._multiply(states, block.t(), logits[:, columns], add=False)
            if self.temperature != 1:
                logits.div_(self.temperature)
            yield rows, logits, scratch

    def backward(
        self,
        grad_logits: Tensor,
        states: Tensor,
        grad_states: Tensor | None,
        grad_weight: Tensor | None,
    ) -> None:
        """Write the gradient of a chunk's hidden states and add that of the weight, in place."""
        grad_logits, states = grad_logits.to(self.operand), states.to(self.operand)
        if grad_states is not None:
            total = torch.zeros(states.shape, dtype=self.dtype, device=states.device)
            for columns, block in self._blocks():
                self._multiply(grad_logits[:, columns], block, total, add=True)
            grad_states.copy_(total)
        if grad_weight is not None:
            self._multiply(grad_logits.t(), states, grad_weight, add=True)

    def _blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield the weight in the operands' type, upcast one block of the vocabulary at a time."""
        if self.weight.dtype == self.operand:
            yield slice(None), self.weight
            return
        size = max(1, BLOCK_BYTES // (self.weight.shape[1] * self.operand.itemsize))
        for start in range(0, len(self.weight), size):
            columns = slice(start, start + size)
            yield columns, self.weight[columns].to(self.operand)

    def _multiply(self, left: Tensor, right: Tensor, out: Tensor, *, add: bool) -> None:
        """Store left @ right in `out`, or add it; autocast leaves in-place products alone."""
        if self.operand == self.dtype:
            out.addmm_(left, right, beta=int(add))
            return
        product = torch.mm(left, right, out_dtype=self.dtype)  # CUDA: half operands, float32 result
        if add:
            out.add_(product)
        else:
            out.copy_(product)


def _cuda_operand(promoted: torch.dtype) -> torch.dtype:
    """Type in which CUDA multiplies: autocast's where it is on, else that of the inputs."""
    return torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else promoted
