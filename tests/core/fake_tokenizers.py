"""Tokenizers small enough to check by hand."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

SPECIALS = ["<pad>", "<user>", "<system>", "<bot>", "<end>", "<eos>"]
PLAIN = (
    "{% for m in messages %}{{ '<bot>' if m.role == 'assistant' else '<' + m.role + '>' }}"
    "{{ m.content }}<end>\n{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
)
TRIMMING = PLAIN.replace("m.content", "m.content | trim")
THINKING = (
    "{% set ns = namespace(asked=0) %}"
    "{% for m in messages if m.role == 'user' %}{% set ns.asked = ns.asked + 1 %}{% endfor %}"
    "{% set ns.seen = 0 %}{% for m in messages %}"
    "{% if m.role == 'user' %}{% set ns.seen = ns.seen + 1 %}{% endif %}"
    "{% if m.role == 'assistant' %}"
    "{% set said = m.content.split('</think>') %}"
    "{% set thought = said[0].split('<think>')[-1].strip('\\n') if said | length > 1 else '' %}"
    "<bot>{% if ns.seen == ns.asked %}{{ '<think>\\n' + thought + '\\n</think>\\n\\n' }}{% endif %}"
    "{{ said[-1].lstrip('\\n') + '<end>\\n' }}"
    "{% else %}{{ '<' + m.role + '>' + m.content + '<end>\\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<bot>"
    "{% if enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}"
)
"""Thoughts are a part of the last answer alone, an empty one where it has none."""


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


def thinking_tokenizer() -> PreTrainedTokenizerFast:
    """A `byte_tokenizer` whose markers of thoughts are added tokens, but no special ones."""
    tokenizer = byte_tokenizer(THINKING, eos_token="<end>", pad_token="<pad>")
    tokenizer.add_tokens(["<think>", "</think>"])
    return tokenizer


@lru_cache
def load(folder: Path) -> PreTrainedTokenizerBase:
    """A tokenizer from its folder; one for all tests."""
    return AutoTokenizer.from_pretrained(folder)


def ids(text: str) -> list[int]:
    """What `byte_tokenizer` makes of ASCII text with special tokens in it."""
    found: list[int] = []
    while text:
        special = next((s for s in SPECIALS if text.startswith(s)), None)
        found.append(256 + SPECIALS.index(special) if special else BYTES[text[0]])
        text = text[len(special or "x") :]
    return found


BYTES = {c: byte_tokenizer().encode(c)[0] for c in map(chr, range(128))}

WORDS = "What is Four Yes No the I A you [INST] [/INST] USER: ASSISTANT:".split()


def blank_tokenizer(template: str, prefix: str = "first", **more: str) -> PreTrainedTokenizerFast:
    """Words with the blank before them, as SentencePiece has them; other characters by bytes.

    prefix: where a blank is put before a text. first: at its beginning alone (Mistral); always:
    before every piece between special tokens; legacy: the same by a normaliser (Llama 2).
    """
    pieces = [f"<0x{i:02X}>" for i in range(256)] + ["▁", *map(chr, range(33, 127))]
    merges = []
    for word in WORDS:
        built = "▁"
        for letter in word:
            merges += [(built, letter)] if (built, letter) not in merges else []
            built += letter
            pieces += [built] if built not in pieces else []
    specials = ["<unk>", "<s>", "</s>"]
    vocabulary = {piece: index for index, piece in enumerate([*specials, *pieces])}
    backend = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>"))
    if prefix == "legacy":
        blanks = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        backend.normalizer = normalizers.Sequence(blanks)
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prefix, split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    backend.add_special_tokens(specials)
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", **more}
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **tokens)
