"""The embedded task (the sandbox): a tokenizer, a model, data and a true reward."""

from denserl_cli.core.sandbox.task import true_reward

__all__ = ["true_reward"]
