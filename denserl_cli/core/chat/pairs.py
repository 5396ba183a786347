"""A prompt and its two responses: put together, and cut to their limits (method §3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from denserl_cli.core.chat.layouts import Encoded
from denserl_cli.core.errors import DenserlError


class EncodedPair(NamedTuple):
    """One prompt and its two responses; each response ends with the terminator."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]


def join_pair(prompt: Encoded, chosen: Encoded, rejected: Encoded) -> EncodedPair:
    """`join` of a pair."""
    return EncodedPair(*join(prompt, chosen, rejected))


def join(prompt: Encoded, *responses: Encoded) -> list[list[int]]:
    """Prompt and responses that follow each other exactly; what one replaces, all have."""
    shared = len(prompt.ids) - max(one.overlap for one in responses)
    own = ([*prompt.ids[shared : len(prompt.ids) - one.overlap], *one.ids] for one in responses)
    return [prompt.ids[:shared], *own]


def check_limits(max_length: int, max_prompt_length: int) -> None:
    """Raise DenserlError when a prompt could leave no room for a response."""
    if not 0 < max_prompt_length < max_length:
        raise DenserlError(
            f"max_prompt_length {max_prompt_length} must be positive and below max_length "
            f"{max_length}, or a prompt leaves no room for its response",
            hint="lower data.max_prompt_length or raise data.max_length",
        )


def truncate_pair(
    pair: EncodedPair, max_length: int, max_prompt_length: int, terminator_id: int
) -> EncodedPair:
    """`truncate` of a pair."""
    return EncodedPair(*truncate(pair, max_length, max_prompt_length, terminator_id))


def truncate(
    parts: Sequence[list[int]], max_length: int, max_prompt_length: int, terminator_id: int
) -> list[list[int]]:
    """Cut the prompt on the left, then all responses on the right, to `max_length` tokens.

    A response that is cut ends with the terminator again (method §3).
    """
    prompt, *responses = parts
    if len(prompt) + max(map(len, responses)) > max_length:
        prompt = prompt[-max_prompt_length:]
    room = max_length - len(prompt)
    cut = [r if len(r) <= room else [*r[: room - 1], terminator_id] for r in responses]
    return [prompt, *cut]
