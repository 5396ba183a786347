"""What a model must be like once it is loaded: whole, causal, with a plain head."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from denserl_cli.core.errors import DenserlError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from denserl_cli.core.models.placement import Placement


@torch.no_grad()
def refuse_damaged_weights(
    model: PreTrainedModel, path: str, what: str, placement: Placement, fresh: str | None = None
) -> None:
    """Raise DenserlError, by name, for weights that are NaN or infinite.

    Args:
        model: As it was loaded.
        path: Where it came from.
        what: The model's part, for the error.
        placement: Where the weights are.
        fresh: Name of a layer that is not from there and has not been drawn yet.
    """
    weights = {
        name: placement.held(weight)
        for name, weight in model.named_parameters()
        if weight.is_floating_point() and not weight.is_meta
        if fresh is None or not name.startswith(fresh)
    }
    # the extremes are not finite where a weight is not; one transfer for all of them
    none = torch.zeros(2, device=model.device)
    extremes = [
        torch.stack(torch.aminmax(weight)).float().to(none.device) if weight.numel() else none
        for weight in weights.values()
    ]
    bad = placement.in_any(~torch.isfinite(torch.stack(extremes)).all(1)).tolist()
    damaged = [name for name, found in zip(weights, bad, strict=True) if found]
    if damaged:
        raise DenserlError(
            f"{path} has weights of the {what} that are NaN or infinite: {', '.join(damaged[:5])}",
            hint="its file is damaged, or the training that made it diverged; name another model",
        )


def once(check: Callable[[Any, str], None], model: Any, path: str) -> None:
    """Check a model, unless one of its architecture and settings has passed in this process."""
    settings = model.config.to_dict()
    for name in ("architectures", "dtype", "id2label", "label2id", "num_labels"):
        settings.pop(name, None)  # they tell models of one body apart
    kind = json.dumps(settings, sort_keys=True, default=str)
    passed = (check.__name__, type(model.base_model).__name__, kind)
    if passed not in _PASSED:
        check(model, path)
        _PASSED.add(passed)


_PASSED: set[tuple[str, str, str]] = set()


@torch.no_grad()
def refuse_two_way_attention(model: PreTrainedModel, path: str) -> None:
    """Raise DenserlError when a token's hidden state depends on the tokens after it."""
    if model.base_model is model:
        raise DenserlError(
            f"{path}: transformers does not tell the body of a {model.config.model_type} model "
            "from its head",
            hint="name a model of another kind: --set model.path=FOLDER",
        )
    rows = torch.arange(8, device=model.device).repeat(2, 1)
    rows[1, 4:] += 8  # another continuation
    training = model.training
    model.eval()
    ids = rows.remainder(model.config.vocab_size)
    one, other = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, :4]
    model.train(training)
    if (one - other).abs().max() > tolerance(one) * one.abs().max():
        raise DenserlError(
            f"{path}: a {model.config.model_type} model that reads in both directions is not a "
            "causal language model",
            hint="name a causal language model: --set model.path=FOLDER",
        )


@torch.no_grad()
def refuse_unusual_head(model: PreTrainedModel, path: str) -> None:
    """Raise DenserlError unless the model's logits are `hidden @ W.T` and nothing else."""
    head = model.get_output_embeddings()
    ids = torch.arange(8, device=model.device).remainder(model.config.vocab_size)[None]
    training = model.training
    model.eval()
    hidden: list[Tensor] = []
    products: list[Tensor] = []
    hooks = [
        model.base_model.register_forward_hook(lambda *call: hidden.append(call[2][0].float())),
        head.register_forward_hook(  # a sharded weight is in place there
            lambda *_: products.append(hidden[0] @ head.weight.float().T), prepend=True
        ),
    ]
    output = model(input_ids=ids, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    model.train(training)
    logits, plain = output.float(), products[0]
    capped = getattr(model.config, "final_logit_softcapping", None)
    if capped or (logits - plain).abs().max() > tolerance(output) * plain.abs().max():
        raise DenserlError(
            f"{path}: the language-model head adds a bias, a scale or a soft cap to its logits",
            hint="denserl supports heads that are a plain matrix product",
        )


def tolerance(output: Tensor) -> float:
    """How far two forward passes of equal results may differ, as a share of the largest number."""
    half = output.dtype == torch.bfloat16 or torch.is_autocast_enabled(output.device.type)
    return 0.05 if half else 1e-4
