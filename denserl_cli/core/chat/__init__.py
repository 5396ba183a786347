"""Conversations to token ids, exactly as the model's own template writes them."""

from denserl_cli.core.chat.format import encode_pair, encode_prompt

__all__ = ["encode_pair", "encode_prompt"]
