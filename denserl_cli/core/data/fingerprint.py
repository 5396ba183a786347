"""What encoded data and segments follow from, in short: files, settings, formats, models, code."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xxhash import xxh3_128

from denserl_cli.core.system.distributed import world_size
from denserl_cli.core.system.environment import device_name, versions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from denserl_cli.core.chat.format import ChatFormat

_BLOCK = 2**20
_ENCODING = (
    "data/sources",
    "data/json_stream",
    "data/row_formats",
    "data/conversations",
    "chat/template",
    "chat/format",
    "data/encoding",
    "data/arrow_rows",
    "data/cache",
    "models/sequence_classifier",
)
"""Modules that decide what a row becomes."""
_SEGMENTING = (
    "data/batches",
    "reward_model/trainer",
    "scoring/segment_cache",
    "models/causal_lm",
    "likelihood",
    "scoring/scorer",
    "segmentation_rules",
    "segmentation",
)
"""Modules that decide where a reward model's training responses are cut."""


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
def of_code() -> dict[str, str]:
    """The code that encodes, our own and the libraries'."""
    import tokenizers
    import transformers

    return {
        "denserl": _of_modules(_ENCODING),
        "tokenizers": tokenizers.__version__,
        "transformers": transformers.__version__,
    }


def of_segmenting() -> dict[str, Any]:
    """What the numbers behind a segment depend on beside models and settings."""
    import torch

    return {
        "code": _of_modules(_SEGMENTING),
        "versions": versions(),
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "processes": world_size(),
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


def _of_modules(names: Sequence[str]) -> str:
    return _of_texts((Path(__file__).parents[1] / f"{name}.py").read_bytes() for name in names)


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
