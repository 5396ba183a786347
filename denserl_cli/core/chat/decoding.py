"""Token ids back to readable text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

INCOMPLETE = "�"


def token_texts(tokenizer: Any, ids: Iterable[int]) -> list[str]:
    """The text of each token of one response; they join to the text of the response.

    A character whose bytes are split over tokens belongs to the token that completes it; the others
    are empty. Each token is decoded after a few that come before it, for many tokenizers write the
    first one differently.
    """
    tokens, texts = list(ids), list[str]()
    start = shown = 0  # tokens[start:shown] are in texts, their own text is context
    context = ""
    for end in range(1, len(tokens) + 1):
        text = _decode(tokenizer, tokens[start:end])
        whole = len(text) > len(context) and not text.endswith(INCOMPLETE)
        if whole or end == len(tokens):
            texts.append(text[len(context) :])
            start, shown = shown, end
            context = _decode(tokenizer, tokens[start:shown])
        else:
            texts.append("")
    return texts


def segment_texts(tokenizer: Any, ids: Iterable[int], ends: Sequence[int]) -> list[str]:
    """The text of each segment of one response, given the segments' last tokens.

    The texts join to the text of the response up to the last end. A character whose bytes are split
    over two segments belongs to the segment that completes it.
    """
    tokens = token_texts(tokenizer, list(ids)[: ends[-1] + 1] if len(ends) else [])
    return joined(tokens, ends)


def joined(texts: Sequence[str], ends: Sequence[int]) -> list[str]:
    """The text of each segment, from those of the tokens."""
    return ["".join(texts[last + 1 : end + 1]) for last, end in pairwise((-1, *ends))]


def segment_values(
    tokenizer: Any, ids: Iterable[int], ends: Sequence[int], values: Sequence[float] | None
) -> list[dict[str, Any]]:
    """Text, tokens and value of each segment of one response.

    ends: the segments' last tokens. values: the reward model's at each token, None without one.
    """
    starts = [0, *(end + 1 for end in ends)]
    return [
        {"text": text, "tokens": end + 1 - start, "value": values and values[end]}
        for text, start, end in zip(segment_texts(tokenizer, ids, ends), starts, ends, strict=False)
    ]


def _decode(tokenizer: Any, ids: list[int]) -> str:
    """The text as it is: no special token left out, no space before punctuation taken away."""
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
