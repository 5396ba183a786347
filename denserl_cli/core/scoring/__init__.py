"""A batch scored: segments by the reference, values by the reward model."""
