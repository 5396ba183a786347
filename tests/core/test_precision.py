from __future__ import annotations

import pytest
import torch

from denserl_cli.core.precision import at_least_float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_half_precision_is_widened_and_nothing_narrowed(dtype):
    values = torch.ones(3, dtype=dtype, requires_grad=True)
    found = at_least_float32(values)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (found is values) == (dtype in (torch.float32, torch.float64))
    found.sum().backward()
    assert values.grad.dtype == dtype
