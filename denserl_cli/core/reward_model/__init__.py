"""The reward model's loss, metrics and training (method section 3)."""

from denserl_cli.core.reward_model.loss import preference_loss
from denserl_cli.core.segmentation import aggregate_segments

__all__ = ["aggregate_segments", "preference_loss"]
