"""What a run is made with: versions of the libraries, and the name of the device."""

from __future__ import annotations

import platform
from importlib import metadata

from denserl_cli import __version__

LIBRARIES = (
    "torch",
    "transformers",
    "datasets",
    "accelerate",
    "deepspeed",
    "peft",
    "tokenizers",
    "safetensors",
    "numpy",
    "scipy",
    "flash-attn",
    "bitsandbytes",
    "triton",
)
"""Those that decide the numbers or the speed of a run; the last three are optional."""


def versions() -> dict[str, str]:
    """Versions of denserl, Python and each installed library; nothing is imported."""
    found = {"denserl": __version__, "python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def numeric_versions() -> dict[str, str]:
    """Versions of what decides how numbers are rounded; torch's with its build, such as +cu130."""
    import torch

    found = versions()
    return {
        "denserl": found["denserl"],
        "torch": str(torch.__version__),  # the metadata of PyPI's wheels do not name the build
        "transformers": found["transformers"],
        "numpy": found["numpy"],
    }


def device_name() -> str:
    """The kind of device that this process works on."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
