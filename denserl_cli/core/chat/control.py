"""Control tokens of a chat format, which no content of a message may yield."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

from denserl_cli.core.chat.template import name_of, plain_ids
from denserl_cli.core.errors import DenserlError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ControlTokens(NamedTuple):
    """The control tokens of one tokenizer and one template."""

    pattern: re.Pattern[str]
    """Finds their texts."""
    unwritable: tuple[str, ...]
    """Those that the tokenizer yields even where they are typed as plain text."""

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, written: Iterable[int]) -> ControlTokens:
        """The special tokens, and of the ids that a format writes those of added tokens."""
        added = tokenizer.added_tokens_decoder
        control = sorted(special_ids(tokenizer) | {i for i in written if i in added})
        texts = {i: str(tokenizer.convert_ids_to_tokens(i)) for i in control}
        texts = {i: text for i, text in texts.items() if text.strip()}
        typed = plain_ids(tokenizer, [f"a {text} b" for text in texts.values()])
        longest_first = sorted(texts.values(), key=len, reverse=True)
        return cls(
            re.compile("|".join(map(re.escape, longest_first)) or "(?!)"),
            tuple(text for (i, text), ids in zip(texts.items(), typed, strict=True) if i in ids),
        )


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids of the tokens that are flagged special."""
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return special | set(tokenizer.all_special_ids)


def token_id(tokenizer: PreTrainedTokenizerBase, token: str, where: str) -> int:
    """The id of a token that a recipe names. Raises DenserlError for an unknown one."""
    found = tokenizer.convert_tokens_to_ids(token)
    if not isinstance(found, int) or tokenizer.convert_ids_to_tokens(found) != token:
        raise DenserlError(
            f"{where}: the tokenizer {name_of(tokenizer)} has no token {token!r}",
            hint="name a token of its vocabulary",
        )
    return found
