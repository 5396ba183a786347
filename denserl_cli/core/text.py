"""Token ids back to readable text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

INCOMPLETE = "�"


def segment_texts(tokenizer: Any, ids: Iterable[int], ends: Sequence[int]) -> list[str]:
    """The text of each segment of one response, given the segments' last tokens.

    The texts join to the text of the response up to the last end. A character whose bytes are split
    over two segments belongs to the segment that completes it.
    """
    tokens, texts, before = list(ids), list[str](), ""
    for place, end in enumerate(ends):
        text = tokenizer.decode(tokens[: end + 1], skip_special_tokens=False)
        whole = text if place == len(ends) - 1 else text.rstrip(INCOMPLETE)
        if len(whole) < len(before):  # an unfinished character can hide finished ones before it
            whole = before
        texts.append(whole[len(before) :])
        before = whole
    return texts


def segment_values(
    tokenizer: Any, ids: Iterable[int], ends: Sequence[int], values: Sequence[float]
) -> list[dict[str, Any]]:
    """Text, tokens and value of each segment of one response.

    ends: the segments' last tokens. values: the reward model's at each token.
    """
    starts = [0, *(end + 1 for end in ends)]
    return [
        {"text": text, "tokens": end + 1 - start, "value": values[end]}
        for text, start, end in zip(segment_texts(tokenizer, ids, ends), starts, ends, strict=False)
    ]
