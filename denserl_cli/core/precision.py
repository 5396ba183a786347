"""Floating-point types: of sums over tokens, and of matrix products on CPUs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor


def at_least_float32(values: Tensor) -> Tensor:
    """Return half-precision values in float32, others as they are."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def seconds_of_a_product(dtype: torch.dtype) -> float:
    """The shortest of some measured times of a matrix product on the CPU."""
    left, right = torch.ones(2, 512, 512, dtype=dtype).unbind()
    taken = []
    for _ in range(4):
        began = time.perf_counter()
        torch.mm(left, right)
        taken.append(time.perf_counter() - began)
    return min(taken)


@cache
def bfloat16_is_fast() -> bool:
    """Whether this CPU multiplies in bfloat16 clearly faster than in float32; measured once.

    With AMX it takes half the time, without instructions for it ten to a hundred times as long.
    """
    return 1.3 * seconds_of_a_product(torch.bfloat16) < seconds_of_a_product(torch.float32)


@contextmanager
def bfloat16_products(enabled: bool) -> Iterator[None]:
    """Let the CPU round the factors of float32 products to bfloat16; sums stay float32.

    It changes nothing but the time where the factors are bfloat16 numbers already.
    """
    if not enabled:
        yield
        return
    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before
