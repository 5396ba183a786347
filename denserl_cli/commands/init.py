"""`denserl init`."""

EXAMPLE = "Example: denserl init x"


def init():
    """Write a recipe."""
