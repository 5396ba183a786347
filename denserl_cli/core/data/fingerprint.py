"""What encoded data and segments follow from, in short: files, settings, formats, models, code."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xxhash import xxh3_128

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from denserl_cli.core.chat.format import ChatFormat

_BLOCK = 2**20
_CORE = Path(__file__).parents[1]
_IMPORT = re.compile(r"^\s*from denserl_cli\.core\.?([\w.]*) import (.*)$", re.MULTILINE)


def of_file(path: Path) -> str:
    """Digest of a file's content."""
    found = xxh3_128()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            found.update(block)
    return found.hexdigest()


def of_settings(settings: Mapping[str, Any]) -> str:
    """Digest of settings that JSON can hold."""
    return xxh3_128(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def of_chat(chat: ChatFormat) -> dict[str, Any]:
    """What the ids of a conversation depend on, its limits apart."""
    template = chat.template
    others = {name: value for name, value in vars(chat).items() if name != "template"}
    return {
        "tokenizer": _of_tokenizer(template.tokenizer),
        "template": template.source,
        "arguments": repr(sorted(template.arguments.items())),
        "format": repr((type(chat).__name__, sorted(others.items()))),
    }


@cache
def of_encoding() -> dict[str, str]:
    """The code that encodes, our own and the libraries'."""
    import tokenizers
    import transformers

    return {
        "denserl": of_code("data.loading", "models.sequence_classifier"),
        "tokenizers": tokenizers.__version__,
        "transformers": transformers.__version__,
    }


def of_model(path: str, revision: str | None) -> Any:
    """What tells models apart: names, sizes and times of a folder's files, or a hub's commit.

    None for a hub name that the hub's cache knows nothing of.
    """
    from huggingface_hub import try_to_load_from_cache

    if Path(path).is_dir():
        files = sorted(file for file in Path(path).iterdir() if file.is_file())
        return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    config = try_to_load_from_cache(path, "config.json", revision=revision)
    return [path, Path(config).parent.name] if isinstance(config, str) else None


@cache
def of_code(*modules: str) -> str:
    """Digest of the sources of modules and of everything of `core` that they import.

    modules: dotted names below `denserl_cli.core`.
    """
    wanted, found = list(modules), set[Path]()
    while wanted:
        name = wanted.pop()
        stem = _CORE.joinpath(*name.split("."))
        file = stem / "__init__.py" if stem.is_dir() else stem.with_suffix(".py")
        if not file.exists() or file in found:  # a name that is no module belongs to one that is
            continue
        found.add(file)
        for module, names in _IMPORT.findall(file.read_text(encoding="utf-8")):
            wanted += [module, *(f"{module}.{n}" for n in re.findall(r"\w+", names))]
    return _of_texts(file.read_bytes() for file in sorted(found))


def _of_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """Vocabulary, merges, normaliser and special tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        return _of_texts([backend.to_str().encode(), repr(tokenizer.special_tokens_map).encode()])
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return _of_texts(
            path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()
        )


def _of_texts(texts: Iterable[bytes]) -> str:
    found = xxh3_128()
    for text in texts:
        found.update(len(text).to_bytes(8, "little") + text)
    return found.hexdigest()
