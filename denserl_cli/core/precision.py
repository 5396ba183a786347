"""The floating-point type of sums over tokens."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_float32(values: Tensor) -> Tensor:
    """Return half-precision values in float32, others as they are."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
