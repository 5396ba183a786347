"""`denserl fit-function`."""

from denserl_cli.commands.stage import stage_command

EXAMPLE = "Example: denserl fit-function --recipe sandbox-segment"

fit_function = stage_command("fit-function", "Fit the normaliser functions of a reward model.")
