"""Models that are trained or frozen under DeepSpeed: ZeRO 1 to 3, offload, several processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from denserl_cli.core.engine.base import NonFiniteError, cosine_schedule
from denserl_cli.core.engine.deepspeed_setup import configuration, import_deepspeed, initialize
from denserl_cli.core.engine.universal import universal
from denserl_cli.core.errors import DenserlError
from denserl_cli.core.models.scalar_head import ScalarHead
from denserl_cli.core.system.distributed import (
    all_reduce_sum,
    is_main_process,
    rank,
    world_size,
)

if TYPE_CHECKING:
    from denserl_cli.core.recipe.schema import EngineConfig, OptimizerConfig

T = TypeVar("T")

_TAG = "shards"


class DeepSpeedEngine:
    """Trains one model, sharded over the processes; float32 master weights.

    DeepSpeed's bfloat16 keeps float32 masters in the optimizer. Its interface is `Engine`'s.
    """

    def __init__(
        self,
        model: Any,
        *,
        learning_rate: float,
        settings: OptimizerConfig,
        total_steps: int,
        compute_dtype: torch.dtype,
        engine: EngineConfig,
    ) -> None:
        self.zero_stage = engine.zero_stage
        self.compute_dtype = compute_dtype
        self.norm = torch.zeros(())
        self.regroup = False
        parameters = [p for p in model.parameters() if p.requires_grad]
        self.heads = _trained_heads(model) if compute_dtype is not torch.float32 else []
        exact = [head.weight.detach().clone() for head in self.heads]
        for head in self.heads:  # ZeRO 3 wants one type for all weights
            head.weight.data = head.weight.data.to(compute_dtype)
        optimizer = _optimizer(parameters, learning_rate, settings, engine)
        self.schedule = cosine_schedule(optimizer, settings, total_steps)
        self.engine = initialize(
            model,
            configuration(engine, settings.clip_norm, compute_dtype),
            optimizer=optimizer,
            lr_scheduler=self.schedule,
        )
        self.engine.checkpoint_engine.save = _save
        self.device = self.engine.device
        self.loss = torch.zeros((), device=self.device)
        for head, weight in zip(self.heads, exact, strict=True):
            _set_master(head.weight, weight)
        self._show_heads()

    @property
    def model(self) -> Any:
        """The model; under ZeRO 3 its weights are in place only inside a call and `gathered`."""
        return self.engine.module.model

    @property
    def learning_rate(self) -> float:
        """The rate of the next step."""
        return float(self.schedule.get_last_lr()[0])

    def __call__(self, function: Callable[..., T], *inputs: Any, **options: Any) -> T:
        """`function(model, *inputs)` with the weights in place, in the compute type."""
        return self.engine(function, *inputs, **options)

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        """Accumulate a loss and its gradient; the step uses the sum over the processes."""
        self.loss = self.loss + loss.detach()
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss * world_size())  # DeepSpeed takes the mean over the processes

    def check(self) -> None:
        """Raise NonFiniteError in all processes when loss or gradient of one is not finite."""
        loss = all_reduce_sum(self.loss.float())
        if not torch.isfinite(loss):
            raise NonFiniteError(f"the loss is {loss:g}")
        self.norm = self._gradient_norm()
        if not torch.isfinite(self.norm):
            raise NonFiniteError("the gradient norm is not finite")

    def update(self) -> Tensor:
        """Clip, update, advance the schedule; returns the gradient norm before clipping."""
        self.engine.step()
        self._show_heads()
        self.loss = torch.zeros((), device=self.device)
        return self.norm

    def discard(self) -> None:
        """Drop the accumulated loss and gradient.

        DeepSpeed does so itself when the norm is not finite, except for the sums that ZeRO 1 and 2
        keep in float32 where Adam is offloaded; they would be added to those of the next step.
        """
        name, _, as_result = _norm_method(self.engine.optimizer)
        bad = as_result(torch.full((), torch.inf, device=self.device))
        setattr(self.engine.optimizer, name, lambda *_: bad)
        try:
            self.update()
        finally:
            delattr(self.engine.optimizer, name)
        if self.zero_stage < 3:
            sums = getattr(self.engine.optimizer, "averaged_gradients", {})
            sums.update(dict.fromkeys(sums))

    def _show_heads(self) -> None:
        """Let scalar heads compute with their float32 masters."""
        for head in self.heads:
            head.exact = _master(head.weight)

    def _gradient_norm(self) -> Tensor:
        """The norm of the accumulated gradient over all processes, as a step would find it."""
        name, as_norm, _ = _norm_method(self.engine.optimizer)
        norm = torch.as_tensor(as_norm(getattr(self.engine.optimizer, name)())).float()
        return torch.where(norm < 0, torch.inf, norm)  # DeepSpeed writes -1 for inf and NaN

    @contextmanager
    def gathered(self) -> Iterator[Any]:
        """Yield the model with all weights in place, on every process, for inference.

        Under ZeRO 3 this gathers once; otherwise the weights would be gathered for every token.
        """
        if self.zero_stage < 3:
            yield self.model
            return
        import deepspeed

        hooks = self.engine.optimizer.parameter_offload
        with deepspeed.zero.GatheredParameters(list(self.engine.module.parameters())):
            for hook in (*hooks.forward_hooks, *hooks.backward_hooks):
                hook.remove()  # they would shard the weights again after each layer
            hooks.forward_hooks.clear()
            hooks.backward_hooks.clear()
            try:
                yield self.model
            finally:
                hooks._register_deepspeed_module(hooks.module)

    def weights(self) -> dict[str, Any] | None:
        """All weights by name, the trained ones' float32 masters; None but in the first process.

        Each is gathered for itself and moved to the CPU's memory before the next one. The body
        under adapters, which are saved without it, stays where it is.
        """
        values: dict[int, Tensor | None] = {}  # a tied weight has two names
        found = {}
        for name, weight in self.model.state_dict(keep_vars=True).items():
            if id(weight) not in values:
                value = _master(weight) if weight.requires_grad else weight.detach()
                values[id(weight)] = value.cpu() if is_main_process() else None
            found[name] = values[id(weight)]
        return found if is_main_process() else None

    def state(self) -> dict[str, Any]:
        """The number of processes and the ZeRO stage that the shards are written under."""
        return {"processes": world_size(), "zero_stage": self.zero_stage}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Raise DenserlError where the shards do not fit this job."""
        now = self.state()
        if "model" in state:
            raise DenserlError(
                "the checkpoint is of one process without DeepSpeed, this job has "
                f"{now['processes']} under ZeRO {now['zero_stage']}",
                hint="go on with one process and the engine as before",
            )
        if state["zero_stage"] != now["zero_stage"]:
            raise DenserlError(
                f"the checkpoint's shards are of ZeRO {state['zero_stage']}, this job's engine is "
                f"of ZeRO {now['zero_stage']}",
                hint="go on with the ZeRO stage as before",
            )
        self.regroup = state["processes"] != now["processes"]

    def save_shards(self, folder: Path) -> None:
        """Write this process's part of weights and optimizer, and the schedule."""
        self.engine.save_checkpoint(str(folder), tag=_TAG, save_latest=False)

    def load_shards(self, folder: Path) -> None:
        """Read what `save_shards` wrote, in as many processes or in another number of them."""
        with universal(folder, _TAG) if self.regroup else nullcontext(folder) as source:
            self.engine._config.load_universal_checkpoint = self.regroup
            found, _ = self.engine.load_checkpoint(str(source), tag=_TAG)
            self.engine._config.load_universal_checkpoint = False
        if found is None:
            raise DenserlError(f"no shards in {folder}", hint="go back to an older checkpoint")
        self._show_heads()


def _trained_heads(model: nn.Module) -> list[ScalarHead]:
    heads = [module for module in model.modules() if isinstance(module, ScalarHead)]
    return [head for head in heads if head.weight.requires_grad]


def _master(weight: Tensor) -> Tensor:
    """The float32 master of a trained weight, whole, in every process; a collective call."""
    from deepspeed.utils import safe_get_full_fp32_param

    master: Tensor = safe_get_full_fp32_param(weight)
    return master.view(getattr(weight, "ds_shape", weight.shape))


def _set_master(weight: Tensor, value: Tensor) -> None:
    """Set the float32 master of a trained weight, here or where its shares are."""
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    if not hasattr(weight, "ds_id"):
        safe_set_full_fp32_param(weight, value)
        return
    share = weight.ds_tensor.numel()  # type: ignore[attr-defined]
    padded = nn.functional.pad(value.flatten(), (0, share * world_size() - value.numel()))
    safe_set_local_fp32_param(weight, padded.narrow(0, share * rank(), share))


def _norm_method(optimizer: Any) -> tuple[str, Callable[[Any], Any], Callable[[Tensor], Any]]:
    """The method from which a step of DeepSpeed's optimizer gets the norm of the gradient.

    Returns:
        Its name, a function from its result to the norm, and a function from a norm to its result.
    """
    from deepspeed.runtime.utils import combine_grad_norm_groups, get_global_norm_of_tensors

    kinds: dict[str, tuple[Callable[[Any], Any], Callable[[Tensor], Any]]] = {
        "scaled_global_norm": (lambda norm: norm, lambda norm: norm),  # ZeRO 1 and 2
        "_get_norm_groups": (combine_grad_norm_groups, lambda norm: [norm]),  # ZeRO 3
        "get_grads_for_norm": (  # ZeRO 1 in bfloat16
            lambda found: get_global_norm_of_tensors(found[0]),
            lambda norm: ([norm], {}),
        ),
    }
    return next((name, *kind) for name, kind in kinds.items() if hasattr(optimizer, name))


def _save(state_dict: Any, path: str) -> None:
    """Write a shard to a file that Python opened: torch's own errors hide the cause."""
    with open(path, "wb") as file:
        torch.save(state_dict, file)


def _optimizer(
    parameters: list[nn.Parameter],
    learning_rate: float,
    settings: OptimizerConfig,
    engine: EngineConfig,
) -> torch.optim.Optimizer:
    """AdamW, or DeepSpeed's where the optimizer's state is offloaded from a GPU to the CPU."""
    common: dict[str, Any] = {
        "lr": learning_rate,
        "betas": settings.betas,
        "weight_decay": settings.weight_decay,
    }
    if engine.offload_optimizer and torch.cuda.is_available():
        return import_deepspeed().ops.adam.DeepSpeedCPUAdam(parameters, adamw_mode=True, **common)
    return torch.optim.AdamW(parameters, fused=True, **common)
