"""What is wrong with the files of a model's or a tokenizer's folder, file by file."""

from __future__ import annotations

import json
from pathlib import Path
from zipfile import is_zipfile

TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
_INDEX = "model.safetensors.index.json"
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin", _INDEX)
_POINTER = b"version https://git-lfs"


def packed_for_llama_cpp(path: Path) -> str | None:
    """The GGUF file that a path is, or that is all the weights of the folder; None without one."""
    if path.suffix.lower() == ".gguf":
        return path.name
    if not path.is_dir() or any(found for kind in _WEIGHTS for found in path.glob(kind)):
        return None
    return next((file.name for file in sorted(path.glob("*.gguf"))), None)


def how_to_unpack(path: Path) -> str:
    """What to do with the GGUF file or folder that a path names."""
    file = packed_for_llama_cpp(path) or "FILE.gguf"
    folder = path.parent if path.name == file else path
    return (
        "name the model that it was packed from; or unpack it, which does not bring back what "
        f"packing lost: AutoModelForCausalLM.from_pretrained({str(folder)!r}, "
        f"gguf_file={file!r}).save_pretrained(FOLDER), and the same with AutoTokenizer "
        "(pip install gguf)"
    )


def damage(folder: Path, *, tokenizer: bool) -> str | None:
    """Name the first file of a folder that is absent or cannot be read, and why.

    Args:
        folder: Where a model or a tokenizer was saved.
        tokenizer: Whether it is read as a tokenizer; weights do not matter then.

    Returns:
        `FILE is damaged: why` or `there is no FILE`; None where every file can be read.
    """
    names = [*TOKENIZER, "special_tokens_map.json", "chat_template.jinja"] if tokenizer else []
    for name in [*names, "config.json", "generation_config.json", "adapter_config.json"]:
        if (folder / name).exists() and (why := _unreadable(folder / name)):
            return f"{name} is damaged: {why}"
    if tokenizer:
        vocabulary = any((folder / name).exists() for name in _VOCABULARIES)
        return None if vocabulary else f"there is no {' or '.join(_VOCABULARIES[:2])}"
    if not (folder / "config.json").exists() and not (folder / "adapter_config.json").exists():
        return "there is no config.json"
    return _damaged_weights(folder)


def _unreadable(file: Path) -> str | None:
    if _is_pointer(file):
        return _FETCH
    try:
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".json" and not isinstance(json.loads(text), dict):
            return "not a JSON object"
    except UnicodeDecodeError as error:
        return f"not UTF-8 text (byte {error.start})"
    except ValueError as error:
        return "empty" if not text else f"not JSON: {error}"
    except OSError as error:
        return str(error.strerror)
    return None


_FETCH = "only a git-lfs pointer, not the file; run git lfs pull in its folder"


def _is_pointer(file: Path) -> bool:
    try:
        with file.open("rb") as opened:
            return opened.read(len(_POINTER)) == _POINTER
    except OSError:
        return False


def _damaged_weights(folder: Path) -> str | None:
    from safetensors import SafetensorError, safe_open

    if not any(found for pattern in _WEIGHTS for found in folder.glob(pattern)):
        return "there is no model.safetensors"
    if (folder / _INDEX).exists():
        if why := _unreadable(folder / _INDEX):
            return f"{_INDEX} is damaged: {why}"
        parts = json.loads((folder / _INDEX).read_text(encoding="utf-8")).get("weight_map")
        if not isinstance(parts, dict) or not parts:
            return f"{_INDEX} is damaged: it names no weights"
        absent = sorted({part for part in parts.values() if not (folder / part).exists()})
        if absent:
            return f"there is no {absent[0]}, which {_INDEX} names"
    elif parts := sorted(folder.glob("model-?????-of-?????.safetensors")):
        return f"there is no {_INDEX} beside {parts[0].name}"
    for file in sorted(folder.glob("pytorch_model*.bin")):
        if why := _torn_pickle(file):
            return f"{file.name} is damaged ({file.stat().st_size:,} bytes): {why}"
    for file in sorted(folder.glob("*.safetensors")):
        if _is_pointer(file):
            return f"{file.name} is {_FETCH}"
        try:
            with safe_open(file, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            size = file.stat().st_size
            return (
                f"{file.name} is damaged ({size:,} bytes): {str(error).partition(': ')[2] or error}"
            )
    return None


def _torn_pickle(file: Path) -> str | None:
    """What is wrong with a file of torch.save, as far as its beginning and its end say."""
    if _is_pointer(file):
        return _FETCH
    with file.open("rb") as opened:
        start = opened.read(2)
    if not start:
        return "empty"
    return None if start != b"PK" or is_zipfile(file) else "its end is missing"
