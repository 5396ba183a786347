"""denserl: dense-reward RLHF from the command line."""

__version__ = "0.1.0"
