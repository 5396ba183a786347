"""Models of which, from the first byte read on, every process holds its share alone (ZeRO 3)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from denserl_cli.core.engine.deepspeed_setup import import_deepspeed
from denserl_cli.core.models.placement import Placement
from denserl_cli.core.system.distributed import (
    barrier,
    join_alone,
    max_over_ranks,
    rank,
    world_size,
)

_SEQUENTIAL = "HF_DEACTIVATE_ASYNC_LOAD"
"""Makes transformers read one weight after the other, not all at once in threads."""


class ShardedPlacement(Placement):
    """Each weight is read, spread over the processes and dropped before the next one is read.

    Weights of another type than the body's, such as a float32 head, are left whole.
    """

    sharded = True

    def __init__(self, dtype: torch.dtype, config: dict[str, Any]) -> None:
        """Set up a placement.

        Args:
            dtype: Of the body's weights.
            config: DeepSpeed's, of the engine that the model is for.
        """
        super().__init__(dtype)
        self.config = config

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Spread every weight that transformers reads for a model."""
        from torch.nn.modules.module import register_module_parameter_registration_hook

        spread = _Spreader(self.dtype, self.config)
        before = os.environ.get(_SEQUENTIAL)
        os.environ[_SEQUENTIAL] = "1"
        hook = register_module_parameter_registration_hook(spread)
        try:
            yield
        finally:
            hook.remove()
            os.environ.pop(_SEQUENTIAL)
            if before is not None:
                os.environ[_SEQUENTIAL] = before

    @contextmanager
    def running(self, model: nn.Module) -> Iterator[None]:
        """Gather the weights of each module while it runs; an engine will do so later."""
        deepspeed = import_deepspeed()
        hooks = []
        for module in model.modules():
            own = [weight for weight in module.parameters(recurse=False) if _is_share(weight)]
            if own:
                gathered = deepspeed.zero.GatheredParameters(own)
                hooks += [
                    module.register_forward_pre_hook(lambda *_, g=gathered: g.__enter__()),
                    module.register_forward_hook(lambda *_, g=gathered: g.__exit__(None, None)),
                ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def held(self, weight: Tensor) -> Tensor:
        """The share of a weight, without what fills up the last process's."""
        if not _is_share(weight):
            return weight.detach()
        share: Tensor = weight.ds_tensor  # type: ignore[attr-defined]
        left = weight.ds_numel - rank() * share.numel()  # type: ignore[attr-defined]
        return share.detach()[: max(0, left)]

    def in_any(self, flags: Tensor) -> Tensor:
        """Which of some flags are set in any process."""
        return max_over_ranks(flags.int()).bool()


class _Spreader:
    """Is called for every weight that a module gets, and spreads those that were read."""

    def __init__(self, dtype: torch.dtype, config: dict[str, Any]) -> None:
        self.dtype, self.config = dtype, config
        self.first: Any = None

    def __call__(self, module: nn.Module, name: str, weight: Any) -> None:
        read = weight is not None and getattr(weight, "_is_hf_initialized", False)
        if not read or weight.is_meta or weight.dtype is not self.dtype or _is_share(weight):
            return
        barrier()  # pages of the file are in memory once, for processes that read them together
        if self.first is not None:
            self.first.convert_to_zero_parameters(param_list=[weight])
            return
        deepspeed = import_deepspeed()
        if world_size() == 1:
            join_alone()
        _cutter(deepspeed)(module=_Holder(weight), config_dict_or_path=self.config)
        self.first = weight


def _cutter(deepspeed: Any) -> Any:
    """DeepSpeed's `zero.Init` that cuts what each process has read, where it sends it around.

    All processes read the same file. Received weights would take memory in each of them once more.
    """

    class Cut(deepspeed.zero.Init):
        def _zero_init_param(self, param: Any) -> None:
            self._convert_to_deepspeed_param(param)
            param.partition()

    return Cut


class _Holder(nn.Module):
    """Shows a weight to DeepSpeed without being told that it gets one."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self._parameters["weight"] = weight


def _is_share(weight: Any) -> bool:
    """Whether DeepSpeed has spread a weight over the processes."""
    return hasattr(weight, "ds_id")
