"""Where the weights of a model are put while it is loaded, and in which type."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from denserl_cli.core.models.device import compute_dtype

if TYPE_CHECKING:
    from denserl_cli.core.recipe.schema import ModelConfig


class Placement:
    """Every process holds all weights, on its device.

    Attributes:
        dtype: Of the weights of a model's body; scalar heads are float32 always.
        sharded: Whether each process holds its share of every weight only.
    """

    sharded = False

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    @contextmanager
    def loading(self) -> Iterator[None]:
        """What stands around the loading of one model."""
        yield

    @contextmanager
    def running(self, model: nn.Module) -> Iterator[None]:
        """What stands around forward passes of a model that has just been loaded."""
        yield

    def held(self, weight: Tensor) -> Tensor:
        """The values of a weight that this process holds."""
        return weight.detach()

    def in_any(self, flags: Tensor) -> Tensor:
        """Which of some flags are set in any process that holds a share."""
        return flags


def whole(model: ModelConfig, *, trained: bool) -> Placement:
    """The placement in one process: float32 to train, otherwise the compute type."""
    return Placement(torch.float32 if trained else compute_dtype(model))


def on_device(device: torch.device) -> dict[str, Any] | None:
    """A device map that sends each weight to a GPU as it is read; None on the CPU."""
    return None if device.type == "cpu" else {"": device}
