"""The reward model's loss, metrics and training (method section 3)."""

from denserl_cli.core.reward_model.loss import aggregate_segments, preference_loss

__all__ = ["aggregate_segments", "preference_loss"]
