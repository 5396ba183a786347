"""Tokenizers as their file has them, where transformers would split text in another way."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from denserl_cli.core.observer import Observer

PROBE = "The answer of 2024 is 3,141 steps:\n\n  don't stop at Zürich, naïve reader; 你好 世界!"
"""Text in which rules of splitting differ: blanks, digits, marks, letters beyond ASCII."""


def read_tokenizer(
    path: str, revision: str | None = None, observer: Observer | None = None
) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a folder or hub name.

    Version 5 of transformers builds a tokenizer by the rules of the class that the model's type
    or its settings name, and ignores those in `tokenizer.json`, which version 4 followed and the
    model was trained with. Where both split text differently, the file counts.

    Args:
        path: A folder or a hub name.
        revision: Of a hub name.
        observer: Told when the file was followed against transformers.

    Raises:
        OSError: There is no tokenizer; other errors of transformers for a damaged one.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=False)
    as_filed = _as_filed(tokenizer, path, revision)
    if as_filed is None or _pieces(as_filed) == _pieces(tokenizer):
        return tokenizer
    if observer is not None:
        observer.notice(
            f"tokenizer: transformers takes {path} for a {type(tokenizer).__name__}, which splits "
            f"text in another way than its tokenizer.json ({_first_difference(as_filed, tokenizer)}"
            "); the file is followed, and other programs should read exports of this run with "
            "PreTrainedTokenizerFast in AutoTokenizer's place"
        )
    return as_filed


def _as_filed(
    tokenizer: PreTrainedTokenizerBase, path: str, revision: str | None
) -> PreTrainedTokenizerBase | None:
    """The tokenizer by its `tokenizer.json` alone; None where it is that already or has none."""
    from transformers import PreTrainedTokenizerFast
    from transformers.utils.hub import cached_file

    if type(tokenizer) is PreTrainedTokenizerFast or not tokenizer.is_fast:
        return None
    found = cached_file(
        path,
        "tokenizer.json",
        revision=revision,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if found is None:
        return None
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": False}
    return PreTrainedTokenizerFast.from_pretrained(path, **options)


def _pieces(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    return list(tokenizer.tokenize(PROBE, add_special_tokens=False))


def _first_difference(as_filed: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> str:
    """The first pieces of both that differ, in words."""
    pairs = zip(_pieces(as_filed), _pieces(other), strict=False)
    ours, theirs = next((pair for pair in pairs if pair[0] != pair[1]), ("its end", "more"))
    return f"{ours!r} there, {theirs!r} by the class"
