"""From places in a text to the tokens after which a response is cut there."""

from __future__ import annotations

import numpy as np


def cut_tokens(
    starts: np.ndarray, stops: np.ndarray, begins: np.ndarray, ends: np.ndarray
) -> np.ndarray:
    """The token after which each of some texts is over.

    A text is over at a start; the white space from there to the stop still belongs to it as far as
    whole tokens go. So it ends with the last token that ends by the stop, or else with the token
    that has the last character before the start. Where no token has that character, as of white
    space that a tokenizer leaves out, the last token before it counts.

    Args:
        starts: (N,), characters before the end of each text, 1 or more.
        stops: (N,), the same with the white space.
        begins: (T,), the first character of each token.
        ends: (T,), the character after its last one; they never fall.

    Returns:
        (N,), numbers of tokens.
    """
    holders = np.searchsorted(ends, starts)
    holders -= np.append(begins, np.iinfo(np.int64).max)[holders] >= starts
    return np.maximum(np.searchsorted(ends, stops, side="right") - 1, holders)
