"""Where to cut responses into segments: the rules of `segmentation.cut`, one function each.

Every rule marks the tokens after which it cuts, and `ends_after` turns them into segment ends. The
method's own rule, the entropy cutoff, is `segment_ends`.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from denserl_cli.core.segmentation import ends_after, segment_ends, token_numbers
from denserl_cli.core.text_cuts import cut_tokens

if TYPE_CHECKING:
    from denserl_cli.core.recipe.resolved import ResolvedSegmentation

_CLOSERS = r"""[)\]"'”’»」』）*_`]*+"""
_TITLES = r"Mr|Mrs|Ms|Dr|Prof|Rev|Gen|Gov|Sen|St|Mt|vs|cf|e\.g|i\.e|[A-HJ-Z]"
_NUMBER = r"\d{1,3}\.(?=\s)"
SENTENCE = re.compile(
    rf"\A\s*{_NUMBER}"  # not a sentence: the number of a list item
    rf"|\b(?:{_TITLES})\.(?=\s)"  # nor an abbreviation before a name
    r"|\b(?:No|Fig|Vol)\.(?=\s*\d)"  # or before a number
    rf"|((?<![.!?…])[.!?…]++{_CLOSERS}(?=\s++(?![a-zß-öø-ÿ]))|[。！？]+{_CLOSERS}|\n)(\s*)"
    rf"(?:{_NUMBER})?"
)
"""Group 1 ends a sentence, group 2 is the white space after it; other matches end no sentence."""
NEWLINE = re.compile(r"(\n)((?:\s*\n)?)")


def above_quantile(
    entropy: Tensor, response_mask: Tensor, quantile: float, terminated: Tensor | None = None
) -> Tensor:
    """Cut where the entropy is above a quantile of the entropies in the same response.

    Args:
        entropy: (B, T), nats, as in `segment_ends`.
        response_mask: (B, T) bool.
        quantile: In [0, 1]. The limit is the smallest entropy that at least this share of the
            tokens do not exceed, of those that can end a segment before the last one.
        terminated: As in `segment_ends`.

    Returns:
        (B, T) bool.
    """
    number, closing = token_numbers(response_mask, terminated)
    candidates = response_mask & (number < closing)
    ordered = entropy.masked_fill(~candidates, math.inf).sort(1).values
    index = (quantile * candidates.sum(1, keepdim=True).double() - 1e-9).ceil().long() - 1
    return entropy > ordered.gather(1, index.clamp(min=0))


def every(response_mask: Tensor, length: int) -> Tensor:
    """Cut after every `length` tokens of the response: (B, T) bool."""
    return response_mask.cumsum(1) % length == 0


def at_random(ids: Tensor, response_mask: Tensor, length: float, seed: int) -> Tensor:
    """Cut after each token with probability 1 / `length`.

    The random number of a token is a hash of the seed and of the response's tokens so far, so it
    does not depend on the batch, the padding or the process.

    Args:
        ids: (B, T) of the responses.
        response_mask: (B, T) bool.
        length: Mean tokens of a segment, 1 or more.
        seed: Of the random numbers.

    Returns:
        (B, T) bool.
    """
    number = response_mask.cumsum(1)
    powers = torch.full((ids.shape[1] + 1,), _signed(0x5851F42D4C957F2D), device=ids.device)
    tokens = _mixed(ids.long() + 1) * powers.cumprod(0)[number]
    state = tokens.masked_fill(~response_mask, 0).cumsum(1)  # int64 wraps around
    uniform = (_mixed(state + _signed(0x9E3779B97F4A7C15 * (seed + 1))) & (2**53 - 1)).double()
    return uniform * length < 2**53


def after_matches(pattern: re.Pattern[str], texts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Cut a response where a pattern matches its text.

    A match ends a segment at its group 1; the white space after it, group 2, belongs to the segment
    as far as whole tokens go. So the cut comes after the last token that ends within group 2, or
    else after the token with the last character of group 1.

    Args:
        pattern: With two groups.
        texts: (T,), the text of each token.
        lengths: (T,), the lengths of these texts.

    Returns:
        (T,) bool.
    """
    found = [(m.end(1), m.end(2)) for m in pattern.finditer("".join(texts)) if m.group(1)]
    cuts = np.zeros(len(texts), bool)
    if found:
        start, stop = np.array(found).T
        ends = lengths.cumsum()
        cuts[cut_tokens(start, stop, ends - lengths, ends)] = True
    return cuts


def vocabulary_texts(tokenizer: Any) -> np.ndarray:
    """The text that each token adds after another one: (V + 1,), the last one empty for other ids.

    A token that is only a part of a character adds the replacement character.
    """
    anchor = tokenizer.encode("a", add_special_tokens=False)[-1]
    pairs = [[anchor], *([anchor, token] for token in range(len(tokenizer)))]
    before, *texts = tokenizer.batch_decode(pairs, clean_up_tokenization_spaces=False)
    return np.array([*(text.removeprefix(before) for text in texts), ""], dtype=object)


class Cutter:
    """Finds the segment ends of responses as a recipe's `segmentation` says."""

    def __init__(self, segmentation: ResolvedSegmentation, tokenizer: Any = None) -> None:
        """Set up a cutter, with a table of all tokens' texts if the cut depends on text.

        Args:
            segmentation: Of the recipe.
            tokenizer: Needed by the cuts that depend on text.
        """
        self.settings, self.cutoff = segmentation, segmentation.cutoff
        self.pattern = {"sentence": SENTENCE, "newline": NEWLINE}.get(segmentation.cut)
        if self.pattern is not None:
            assert tokenizer is not None
            self.texts = vocabulary_texts(tokenizer)
            self.lengths = np.array([len(text) for text in self.texts])

    def __call__(
        self, ids: Tensor, entropy: Tensor | None, response_mask: Tensor, terminated: Tensor | None
    ) -> Tensor:
        """The segment ends of responses.

        Args:
            ids: (B, T), tokens of the responses.
            entropy: (B, T), nats; None where segments do not depend on it.
            response_mask: (B, T) bool.
            terminated: As in `segment_ends`.

        Returns:
            (B, T) bool.
        """
        if self.settings.granularity != "segment" or self.settings.cut == "entropy":
            return segment_ends(
                torch.zeros_like(response_mask, dtype=torch.float) if entropy is None else entropy,
                response_mask,
                granularity=self.settings.granularity,
                cutoff=self.cutoff,
                terminated=terminated,
            )
        cuts = self._cuts(ids, entropy, response_mask, terminated)
        return ends_after(cuts, response_mask, terminated)

    def _cuts(
        self, ids: Tensor, entropy: Tensor | None, response_mask: Tensor, terminated: Tensor | None
    ) -> Tensor:
        settings = self.settings
        if settings.cut == "quantile":
            assert entropy is not None and settings.quantile is not None
            return above_quantile(entropy, response_mask, settings.quantile, terminated)
        if self.pattern is not None:
            return self._text_cuts(self.pattern, ids, response_mask)
        length = settings.segment_length
        assert length is not None
        if settings.cut == "fixed":
            return every(response_mask, round(length))
        assert settings.cut_seed is not None
        return at_random(ids, response_mask, length, settings.cut_seed)

    def _text_cuts(self, pattern: re.Pattern[str], ids: Tensor, response_mask: Tensor) -> Tensor:
        known = ids.clamp(max=len(self.texts) - 1).cpu().numpy()
        cuts, mask = np.zeros(known.shape, bool), response_mask.cpu().numpy()
        for row, counts in enumerate(mask):
            tokens = known[row, counts]
            cuts[row, counts] = after_matches(pattern, self.texts[tokens], self.lengths[tokens])
        return torch.from_numpy(cuts).to(ids.device)


def _mixed(values: Tensor) -> Tensor:
    """Scramble 64-bit integers (the finaliser of SplitMix64)."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        values = (values ^ _shifted(values, shift)) * _signed(factor)
    return values ^ _shifted(values, 31)


def _shifted(values: Tensor, bits: int) -> Tensor:
    """An unsigned right shift; torch's `>>` keeps the sign."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    """The same 64 bits as a signed integer."""
    return (value + 2**63) % 2**64 - 2**63
