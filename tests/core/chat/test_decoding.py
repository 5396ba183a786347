"""Segments' texts join to the text of the response, whatever the tokenizer does with bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from denserl_cli.core.chat.decoding import segment_texts
from tests.core.fake_tokenizers import byte_tokenizer

TEXTS = [
    "Hello , world ! don't  stop .\n\n* one\n",
    "  two 🤖👩‍🚀 é ñ",
    "日本語👍🏽. ",
    " leading",
    "a \ufffd mark \ufffd",
    "🤖🤖🤖",
]


def every(count: int) -> list[int]:
    return list(range(count))


def test_a_split_character_belongs_to_the_segment_that_completes_it():
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode("aé🤖b")  # 1 + 2 + 4 + 1 bytes
    assert segment_texts(tokenizer, ids, every(8)) == ["a", "", "é", "", "", "", "🤖", "b"]
    assert segment_texts(tokenizer, ids, [1, 4, 7]) == ["a", "é", "🤖b"]


def test_what_comes_after_the_last_end_is_left_out():
    tokenizer = byte_tokenizer()
    ids = [*tokenizer.encode("yes"), 260]
    assert segment_texts(tokenizer, ids, [0, 2]) == ["y", "es"]
    assert segment_texts(tokenizer, ids, [3]) == ["yes<end>"]


def test_a_character_that_is_cut_off_shows_as_such():
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode("a🤖")[:-1]
    assert "".join(segment_texts(tokenizer, ids, [0, 3])) == "a\ufffd"


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("length", [1, 2, 3])
def test_byte_level_texts_join(text: str, length: int):
    joins(byte_tokenizer(), text, length)


@pytest.mark.parametrize("name", ["phi3-mini", "llama3.1", "llama3"])
def test_real_tokenizers_texts_join(name: str, shared: Path):
    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers" / name)
    for text in TEXTS:
        for length in (1, 2, 3):
            joins(tokenizer, text, length)


def joins(tokenizer: Any, text: str, length: int) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    ends = sorted({*range(length - 1, len(ids), length), len(ids) - 1})
    texts = segment_texts(tokenizer, ids, ends)
    assert len(texts) == len(ends)
    assert "".join(texts) == tokenizer.decode(ids)
