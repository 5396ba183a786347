"""Prompts and responses as text on its way to ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from denserl_cli.core.chat.template import common_length, marked_ids, plain_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Part(NamedTuple):
    """A piece of text on its way to ids. plain: control tokens in it are words like any other."""

    text: str
    plain: bool = False


class Layout(NamedTuple):
    """A prompt or a response on its way to ids.

    context: what stands before a response and belongs to the prompt; the first part begins with
    it. ending: ids after the last part.
    """

    parts: tuple[Part, ...]
    context: str = ""
    ending: tuple[int, ...] = ()


class Encoded(NamedTuple):
    """Ids of a prompt or a response.

    overlap: how many of the prompt's last ids a response replaces, where its first characters and
    the template's last ones before it make one token, as a line break after ChatML's does.
    """

    ids: list[int]
    overlap: int = 0


def tokenize(tokenizer: PreTrainedTokenizerBase, layouts: Sequence[Layout]) -> list[Encoded]:
    """Ids of many layouts at once, which uses all cores."""
    parts = [part for layout in layouts for part in layout.parts]
    parts += [Part(layout.context) for layout in layouts if layout.context]
    ids: dict[Part, list[int]] = {}
    for plain, encode in ((True, plain_ids), (False, marked_ids)):
        some = list(dict.fromkeys(part for part in parts if part.plain == plain))
        ids |= zip(some, encode(tokenizer, [part.text for part in some]), strict=True)
    encoded = []
    for layout in layouts:
        found = [i for part in layout.parts for i in ids[part]]
        known = ids[Part(layout.context)] if layout.context else []
        kept = common_length(known, found)
        encoded.append(Encoded([*found[kept:], *layout.ending], len(known) - kept))
    return encoded


def follow(prompt: Encoded, response: Encoded) -> tuple[list[int], list[int]]:
    """Ids of a prompt and of a response that follow each other exactly."""
    return prompt.ids[: len(prompt.ids) - response.overlap], response.ids
