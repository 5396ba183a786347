"""Models on the hub or in a folder: readable errors, and names of tensors without loading them."""

from __future__ import annotations

import json
import os
from pathlib import Path

from denserl_cli.core.errors import DenserlError
from denserl_cli.core.system.damage import damage, how_to_unpack, packed_for_llama_cpp

_TRAIN_AGAIN = "train it again, with --fresh"


class readable_errors:
    """Turn what transformers raises for a missing or unusable model into one DenserlError.

    Args:
        path: folder or hub name of the model.
        what: what it is called in the message.
        option: the recipe's field that names another; "" where the folder is the run's own.
    """

    def __init__(self, path: str, what: str, option: str = "model.path") -> None:
        self.path, self.what, self.option = path, what, option

    def __enter__(self) -> None:
        """Nothing to prepare."""

    def __exit__(self, kind: type | None, error: BaseException | None, _: object) -> None:
        from pickle import UnpicklingError

        from huggingface_hub.errors import StrictDataclassError
        from safetensors import SafetensorError

        if not isinstance(error, Exception) or isinstance(error, DenserlError):
            return
        if packed_for_llama_cpp(Path(self.path)) or self.path.lower().endswith("gguf"):
            raise DenserlError(
                f"cannot load the {self.what} {self.path}: GGUF holds weights that are packed for "
                "llama.cpp, mostly into 4 bits each, and packed weights cannot be trained",
                hint=how_to_unpack(Path(self.path)),
            ) from error
        folder = Path(self.path) if Path(self.path).is_dir() else _snapshot(self.path)
        if folder and (found := damage(folder, tokenizer=self.what == "tokenizer")):
            again = (
                f"copy or download the folder again, or name another: --set {self.option}=FOLDER"
            )
            if self.what == "tokenizer" and self.option == "model.path":
                again += ", or a tokenizer elsewhere: --set model.tokenizer=FOLDER"
            raise DenserlError(
                f"cannot load the {self.what} {self.path}: {found}",
                hint=again if self.option else _TRAIN_AGAIN,
            ) from error
        if folder and self.what != "adapters" and _adapters_alone(folder):
            raise DenserlError(
                f"cannot load the {self.what} {self.path}: it holds adapters, not a whole model",
                hint="merge them into their model first: denserl export does, or peft's "
                "merge_and_unload",
            ) from error
        torn = (SafetensorError, UnpicklingError, EOFError, RuntimeError, StrictDataclassError)
        wrong = (ValueError, TypeError, KeyError, ArithmeticError)  # figures in config.json
        if isinstance(error, (OSError, ImportError, *wrong, *torn)):
            advice = "name the folder of a downloaded model"
            reason, first = _hub_refusal(self.path, error) or (_first_line(error), "")
            hint = f"{first}, or {advice}" if first else advice
            raise DenserlError(
                f"cannot load the {self.what} {self.path}: {reason}",
                hint=f"{hint}: --set {self.option}=FOLDER" if self.option else _TRAIN_AGAIN,
            ) from error


def weight_names(path: str, revision: str | None = None) -> set[str] | None:
    """Names of a model's tensors, without loading them; None where it has no safetensors file."""
    from safetensors import safe_open
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

    for name in (SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME):
        found = cached_file(
            path, name, revision=revision, _raise_exceptions_for_missing_entries=False
        )
        if found is not None and name == SAFE_WEIGHTS_INDEX_NAME:
            return set(json.loads(Path(found).read_text(encoding="utf-8"))["weight_map"])
        if found is not None:
            with safe_open(found, "pt") as file:
                return set(file.keys())
    return None


def _hub_refusal(path: str, error: BaseException) -> tuple[str, str] | None:
    """Why the hub did not provide a model and what to do; None for an error of another kind."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    page = f"https://huggingface.co/{path}"
    cause: BaseException | None = error
    while cause is not None:  # transformers wraps the hub's errors
        if isinstance(cause, GatedRepoError):
            return "its licence is not accepted", f"accept it at {page} and run `hf auth login`"
        if isinstance(cause, RepositoryNotFoundError):
            advice = "correct the name, run `hf auth login` if it is private"
            return "no such folder, and no such model on the hub", advice
        if isinstance(cause, RevisionNotFoundError):
            return "the hub has no such revision of it", f"choose one of {page}/tree/main"
        if isinstance(cause, (OfflineModeIsEnabled, LocalEntryNotFoundError)):
            reason = "no such folder, not downloaded yet, and the hub is out of reach"
            advice = f"download it where there is a network: `hf download {path}`"
            return reason, f"{advice} (accept its licence first if {page} asks for it)"
        if isinstance(cause, HfHubHTTPError):
            status = cause.response.status_code
            if status in (401, 403):
                return f"the hub refuses it ({status})", f"ask for access at {page} and log in"
            return f"the hub answers {status}", "try again later"
        cause = cause.__cause__ or cause.__context__
    return None


def _snapshot(path: str) -> Path | None:
    """The folder of a hub model in the cache of this machine; None where it is not there."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(path, "config.json")
    except HFValidationError:  # neither a folder nor a name that the hub allows
        return None
    return Path(found).parent if isinstance(found, str) else None


def _adapters_alone(folder: Path) -> bool:
    return (folder / "adapter_config.json").exists() and not (folder / "config.json").exists()


def _first_line(error: BaseException) -> str:
    """The first sentence of an error; where that only announces the next line, both."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return repr(error)
    announced = lines[0].endswith(":") and len(lines) > 1
    return f"{lines[0]} {lines[1]}" if announced else lines[0]


def has_tokenizer(path: str, revision: str | None = None) -> bool:
    """Whether a folder, or the hub's cache on this machine, holds a tokenizer; nothing is loaded.

    Args:
        path: Folder or hub name.
        revision: Of a hub name.
    """
    if any(Path(path, name).exists() for name in ("tokenizer_config.json", "tokenizer.json")):
        return True
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    if not (cache.expanduser() / f"models--{path.replace('/', '--')}").is_dir():
        return False
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(path, "tokenizer_config.json", revision=revision)
    return isinstance(found, str)
