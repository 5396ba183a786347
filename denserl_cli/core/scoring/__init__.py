"""Scoring of responses: segments by the reference's entropy, values by the reward model."""
