"""How good a reward model and a policy are, and the scores of any responses."""

from denserl_cli.core.evaluation.responses import score_responses

__all__ = ["score_responses"]
