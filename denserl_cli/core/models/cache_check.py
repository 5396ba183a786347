"""Whether a model reads token by token, with a cache of keys, as it reads at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from denserl_cli.core.errors import DenserlError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TOLERANCE = {torch.float32: 1e-3}
"""Distance of two logits as a share of their size; a wrong cache makes it about 1."""


@torch.no_grad()
def refuse_unfaithful_cache(model: PreTrainedModel, path: str) -> None:
    """Raise DenserlError unless responses can be sampled from a model token by token.

    Args:
        model: A causal language model with all weights in place.
        path: Where it came from.
    """
    training = model.training
    model.eval()
    try:
        cached, at_once = _last_logits(model)
        error = (cached - at_once).norm() / (at_once - at_once.mean()).norm()
        half = torch.is_autocast_enabled(model.device.type)
        allowed = 0.2 if half else _TOLERANCE.get(model.dtype, 0.2)
        why = "it reads otherwise with its cache of keys than without" if error > allowed else ""
    except torch.OutOfMemoryError:
        raise
    # whatever an architecture raises that does not support what sampling asks of it
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as failure:
        why = f"{type(failure).__name__}: {failure}".splitlines()[0]
    finally:
        model.train(training)
    if why:
        raise DenserlError(
            f"{path}: responses cannot be sampled from a {model.config.model_type} model: {why}",
            hint="name a model of another kind, or try --set model.attention=eager",
        )


def _last_logits(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Logits after a row's last token, (V,): read as sampling reads, and at once.

    The row is padded on the left beside a longer one, which leaves the batch before its end.
    """
    from transformers import DynamicCache

    ids = torch.arange(1, 15, device=model.device).remainder(model.config.vocab_size).view(2, 7)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    cache = DynamicCache(config=model.config)
    begun = 0
    for end in (4, 5, 6, 7):
        positions = (mask[:, :end].cumsum(1) - 1).clamp(min=0)[:, begun:]
        logits = model(
            input_ids=ids[:, begun:end],
            attention_mask=mask[:, :end],
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        begun = end
        if end == 5:
            cache.reorder_cache(ids.new_zeros(1))  # type: ignore[arg-type]
            ids, mask = ids[:1], mask[:1]
    at_once = model(input_ids=ids[:, 2:], use_cache=False).logits
    return logits[0, -1].float(), at_once[0, -1].float()
