"""Tokenizers small enough to check by hand."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIALS = ["<pad>", "<user>", "<system>", "<bot>", "<end>", "<eos>"]
PLAIN = (
    "{% for m in messages %}{{ '<bot>' if m.role == 'assistant' else '<' + m.role + '>' }}"
    "{{ m.content }}<end>\n{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
)
TRIMMING = PLAIN.replace("m.content", "m.content | trim")


def byte_tokenizer(template: str | None = PLAIN, **tokens: str) -> PreTrainedTokenizerFast:
    """One token a byte: an ASCII letter's id is its code, special tokens follow from 256 on."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    printable = [c for c in map(chr, range(256)) if c in alphabet]
    others = [c for c in alphabet if ord(c) > 255]
    ids = {c: ord(c) for c in printable}
    free = (i for i in range(256) if i not in ids.values())
    ids |= dict(zip(others, free, strict=True))
    backend = Tokenizer(models.BPE(ids, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIALS)
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **tokens)


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word; a control token that is typed as a word comes out as itself."""
    words = [*SPECIALS, "<unknown>", "yes", "no"]
    vocabulary = {word: index for index, word in enumerate(words)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(SPECIALS)
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=PLAIN)


def ids(text: str) -> list[int]:
    """What `byte_tokenizer` makes of ASCII text with special tokens in it."""
    found: list[int] = []
    while text:
        special = next((s for s in SPECIALS if text.startswith(s)), None)
        found.append(256 + SPECIALS.index(special) if special else BYTES[text[0]])
        text = text[len(special or "x") :]
    return found


BYTES = {c: byte_tokenizer().encode(c)[0] for c in map(chr, range(128))}
