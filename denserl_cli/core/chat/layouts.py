"""Prompts and responses as text on its way to ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

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


class Placed(NamedTuple):
    """Where the tokens of a response are in the content of its answer.

    Attributes:
        content: As the template writes it.
        begins: (T,), the first character of each token, below 0 before the content. What the
            template writes after the content may be left out.
        ends: (T,), the character after the last one of each.
    """

    content: str
    begins: np.ndarray
    ends: np.ndarray


def place_answers(
    tokenizer: PreTrainedTokenizerBase,
    responses: Sequence[tuple[Layout, Encoded]],
    lead: str,
    closing: str,
) -> list[Placed]:
    """Where the tokens of many responses are.

    Args:
        tokenizer: A fast one.
        responses: Layouts of responses, and what `tokenize` made of them.
        lead: What the template writes before a content, after its context.
        closing: What the template writes after it.
    """
    first = [layout.parts[0] for layout, _ in responses]
    places: dict[Part, np.ndarray] = {}
    for plain in (True, False):
        some = list(dict.fromkeys(part for part in first if part.plain == plain))
        found = _places(tokenizer, [part.text for part in some], plain=plain)
        places |= zip(some, found, strict=True)
    placed = []
    for part, (layout, encoded) in zip(first, responses, strict=True):
        content, where, start, kept = part.text, places[part], 0, 0
        if not part.plain:
            start = len(layout.context + lead)
            content = content[start : len(content) - len(closing)]
            kept = len(where) - (len(encoded.ids) - len(layout.ending))
        begins, ends = (where[kept:] - start).T
        placed.append(Placed(content, begins, np.maximum.accumulate(ends)))
    return placed


def follow(prompt: Encoded, response: Encoded) -> tuple[list[int], list[int]]:
    """Ids of a prompt and of a response that follow each other exactly."""
    return prompt.ids[: len(prompt.ids) - response.overlap], response.ids


def _places(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, plain: bool
) -> list[np.ndarray]:
    """The first character of each token and the one after its last: (T, 2) for each text.

    Args:
        tokenizer: A fast one.
        texts: To be tokenised as by `plain_ids` or `marked_ids`.
        plain: Which of the two.
    """
    if not texts:
        return []
    encoded = tokenizer(
        list(texts),
        add_special_tokens=False,
        return_attention_mask=False,
        return_offsets_mapping=True,
        verbose=False,
        **({"split_special_tokens": True} if plain else {}),
    )
    return [np.array(one, np.int64).reshape(-1, 2) for one in encoded["offset_mapping"]]
