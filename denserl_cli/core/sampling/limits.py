"""Sizes of a rollout that samplers keep to and plans count."""

MOST_ROWS = 128
"""Rows where memory is plenty: more make a step longer, and hardly more tokens a second."""
PLANNED_ROWS = 16
"""Rows that a plan counts where a recipe leaves them open; where more fit, more are used."""
PROMPT_TOKENS = {"cpu": 2048, "cuda": 16384}
"""Tokens of prompts, padding included, that are read in one pass."""
