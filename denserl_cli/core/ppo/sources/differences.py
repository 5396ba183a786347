"""Differences of a reward model's values from place to place (RED, arXiv 2411.08302)."""

from __future__ import annotations

import torch
from torch import Tensor


def differences(token_values: Tensor, prompt_value: Tensor, places: Tensor) -> Tensor:
    """What each part of a response adds to the reward model's value: R(e_k) - R(e_{k-1}).

    The first difference is to the value after the prompt, so a response's rewards add up to
    R(e_K) - R(0) (Li et al. 2024). With gamma 1 this is shaping by the potential R (Ng et al.).

    Args:
        token_values: (B, T), R at each token.
        prompt_value: (B,), R(0), at the prompt's last token.
        places: (B, T) bool, where parts end: of the segments, or every token.

    Returns:
        (B, T), 0 elsewhere.
    """
    columns = torch.arange(places.shape[1], device=places.device)
    latest = torch.where(places, columns, -1).cummax(1).values  # the latest place up to each token
    before = torch.cat([torch.full_like(latest[:, :1], -1), latest[:, :-1]], dim=1)
    previous = torch.cat([prompt_value[:, None], token_values], dim=1).gather(1, before + 1)
    return (token_values - previous).masked_fill(~places, 0)
