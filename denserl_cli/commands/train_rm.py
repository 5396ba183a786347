"""`denserl train-rm`."""

from denserl_cli.commands.stage import stage_command

EXAMPLE = "Example: denserl train-rm --recipe sandbox-segment"

train_rm = stage_command("train-rm", "Train a recipe's reward model on preference pairs.")
