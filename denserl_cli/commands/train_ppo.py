"""`denserl train-ppo`."""

from denserl_cli.commands.common import PromptsOption
from denserl_cli.commands.stage import stage_command

EXAMPLE = "Example: denserl train-ppo --recipe sandbox-segment"

train_ppo = stage_command(
    "train-ppo", "Train a recipe's policy by PPO with dense rewards.", PromptsOption
)
