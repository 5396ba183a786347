"""Tokenizers that transformers builds by a class whose rules are not those of the file."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config

from denserl_cli.core.chat.tokenizer_file import read_tokenizer
from denserl_cli.core.observer import Observer


class Notices(Observer):
    def __init__(self) -> None:
        self.heard: list[str] = []

    def notice(self, message: str) -> None:
        self.heard.append(message)


def folder_with(folder: Path, pre_tokenizer: pre_tokenizers.PreTokenizer) -> str:
    """A Qwen2 folder with a byte-level tokenizer that knows some pieces with blanks before them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("a", "n"), ("Ġ", "i"), ("Ġi", "s"), ("2", "0")]
    pieces = [*alphabet, *("".join(pair) for pair in merges), "<end>"]
    tokenizer = Tokenizer(models.BPE({one: i for i, one in enumerate(pieces)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    words = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    words.chat_template = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    words.save_pretrained(folder)
    Qwen2Config(vocab_size=len(pieces)).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("text", ["is 2024 an end", "an  is\n20"])
def test_the_file_is_followed_where_transformers_follows_a_class(tmp_path: Path, text: str):
    path = folder_with(tmp_path, pre_tokenizers.ByteLevel(add_prefix_space=True))
    raw = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    wrong = AutoTokenizer.from_pretrained(path)
    assert wrong.encode(text) != raw.encode(text).ids, "transformers reads the file as it stands"

    notices = Notices()
    tokenizer = read_tokenizer(path, observer=notices)
    assert tokenizer.encode(text, add_special_tokens=False) == raw.encode(text).ids
    assert tokenizer.eos_token == "<end>" and tokenizer.chat_template
    (said,) = notices.heard
    assert path in said and "Qwen2Tokenizer" in said and "PreTrainedTokenizerFast" in said

    tokenizer.save_pretrained(tmp_path)  # as a run's folders hold it
    assert read_tokenizer(path).encode(text) == tokenizer.encode(text)


def test_a_class_that_splits_as_the_file_does_stays(tmp_path: Path):
    words = AutoTokenizer.from_pretrained(folder_with(tmp_path, pre_tokenizers.ByteLevel()))
    words.save_pretrained(tmp_path)  # now the file has the rules of the class
    notices = Notices()
    assert type(read_tokenizer(str(tmp_path), observer=notices)) is type(words)
    assert not notices.heard
