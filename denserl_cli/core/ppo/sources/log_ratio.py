"""Rewards implied by a second policy (RTO, arXiv 2404.18922; PRIME, 2502.01456)."""

from __future__ import annotations

from torch import Tensor


def log_ratio(
    model_logprobs: Tensor,
    reference_logprobs: Tensor,
    mask: Tensor,
    *,
    scale: float = 0.05,
    clip: float = 0.05,
) -> Tensor:
    """clamp(scale * (log π_φ - log π_ref), ± clip) of each token (Zhong et al. 2024).

    Args:
        model_logprobs: (B, T), nats, of the second policy π_φ, such as one that DPO trained.
        reference_logprobs: (B, T), nats.
        mask: (B, T) bool, of the response.
        scale: Factor of the ratio, as β of DPO.
        clip: Largest absolute reward, after `scale`.

    Returns:
        (B, T); exactly 0 where the two policies agree.
    """
    ratio = (model_logprobs - reference_logprobs).masked_fill(~mask, 0)
    return (scale * ratio).clamp(-clip, clip)
