"""What a machine has of what denserl needs: facts for a bug report, and none that are private."""

from __future__ import annotations

import getpass
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from denserl_cli.core.doctor.requirements import RecipeNeeds, recipe_needs
from denserl_cli.core.errors import DenserlError
from denserl_cli.core.system.environment import LIBRARIES, versions

GIB = 2**30
_SECONDS = 5.0
"""How long another program may take to answer."""
_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
_PLAIN = ("not set", "0", "1", "false", "true", "no", "yes", "off", "on")
"""What of a variable may be told; anything else may be a secret in the wrong place."""

Probe = Callable[[], Iterator[tuple[str, str]]]


@dataclass(frozen=True)
class Diagnosis:
    """What a machine has.

    Attributes:
        sections: Facts by name, by the name of their section.
        broken: What is broken or missing that denserl cannot do without.
        recipes: What each recipe needs.
    """

    sections: dict[str, dict[str, str]]
    broken: list[str]
    recipes: list[RecipeNeeds]


def diagnose(recipes: Sequence[str]) -> Diagnosis:
    """Look at everything; a probe that fails becomes a fact itself."""
    sections = {name: _facts(probe) for name, probe in PROBES.items()}
    broken = list(_broken())
    needs = [_needs(name) for name in recipes]
    redact = redactor()
    return Diagnosis(
        {
            name: {key: redact(value) for key, value in facts.items()}
            for name, facts in sections.items()
        },
        [redact(line) for line in broken],
        [one.redacted(redact) for one in needs],
    )


def _facts(probe: Probe) -> dict[str, str]:
    """The facts of a probe, up to where it fails."""
    facts: dict[str, str] = {}
    try:
        with warnings.catch_warnings(), redirect_stdout(sys.stderr):
            warnings.simplefilter("ignore")
            for name, value in probe():
                facts[name] = value
    except Exception as error:  # a broken library may raise anything, and that is what we look for
        facts["failed"] = _first_line(error)
    return facts


def _needs(name: str) -> RecipeNeeds:
    """What a recipe needs; DenserlError for a wrong recipe alone."""
    try:
        return recipe_needs(name)
    except DenserlError:
        raise
    except Exception as error:  # as above
        return RecipeNeeds(name, [], [f"could not be examined: {_first_line(error)}"])


def _versions() -> Iterator[tuple[str, str]]:
    known = versions()
    yield from known.items()
    for name in LIBRARIES:
        if name not in known:
            yield name, "not installed"


def _machine() -> Iterator[tuple[str, str]]:
    import psutil

    yield "system", platform.platform()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield "CPU cores", f"{usable} usable of {os.cpu_count()}"
    memory = psutil.virtual_memory()
    yield "memory", f"{_gib(memory.available)} free of {_gib(memory.total)}"
    with suppress(OSError, ValueError):  # a container's own limit, where there is one
        yield "memory limit", _gib(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    for name, place in {"disk, here": Path.cwd(), "disk, hub cache": _hub_cache()}.items():
        there = next(p for p in (place, *place.parents) if p.exists())
        disk = shutil.disk_usage(there)
        yield name, f"{_gib(disk.free)} free of {_gib(disk.total)} ({place})"


def _gpus() -> Iterator[tuple[str, str]]:
    import torch

    yield "torch built for", f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
    for place in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(place)
        free, total = torch.cuda.mem_get_info(place)
        yield (
            f"GPU {place}",
            f"{found.name}, {_gib(free)} free of {_gib(total)}, "
            f"capability {found.major}.{found.minor}",
        )
    if not torch.cuda.is_available():
        yield "GPUs", "none that torch can use"
    yield "driver", _driver()


def _driver() -> str:
    words = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=_SECONDS)
    except FileNotFoundError:
        return "no nvidia-smi"
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"nvidia-smi failed: {type(error).__name__}"
    said = " ".join(dict.fromkeys(done.stdout.split()))
    return said if done.returncode == 0 else f"nvidia-smi failed with exit code {done.returncode}"


def _deepspeed() -> Iterator[tuple[str, str]]:
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")
    yield "C++ compiler", "found" if compiler else "none: several CPU processes need one"
    yield "ninja", "found" if shutil.which("ninja", path=_path()) else "not on the PATH"
    built = sorted({file.stem for file in _extensions().glob("*/*/*.so")})
    yield "extensions built", ", ".join(built) or "none yet: built at first use"
    from denserl_cli.core.engine.deepspeed_setup import import_deepspeed

    yield "import", f"works, {import_deepspeed().__version__}"


def _attention() -> Iterator[tuple[str, str]]:
    from transformers.utils import is_flash_attn_2_available

    from denserl_cli.core.models.attention import attention_kernel
    from denserl_cli.core.models.device import compute_dtype
    from denserl_cli.core.precision import bfloat16_is_fast
    from denserl_cli.core.recipe.schema import ModelConfig

    yield "FlashAttention 2", "usable" if is_flash_attn_2_available() else "not usable here"
    yield "model.attention: auto is", attention_kernel(ModelConfig())
    usual = str(compute_dtype(ModelConfig())).removeprefix("torch.")
    yield "model.dtype: auto is", "bfloat16" if bfloat16_is_fast() else usual


def _hub() -> Iterator[tuple[str, str]]:
    from huggingface_hub import constants, get_token

    for name in _OFFLINE:
        value = os.environ.get(name, "not set")
        yield name, value if value.lower() in _PLAIN else "set"
    yield "hub", "switched off" if constants.HF_HUB_OFFLINE else "allowed; not tried"
    yield "token", "set" if get_token() else "not set"
    cache = _hub_cache()
    for kind in ("models", "datasets"):
        count = len(list(cache.glob(f"{kind}--*"))) if cache.is_dir() else 0
        yield f"{kind} in the cache", f"{count} ({cache})"


PROBES: dict[str, Probe] = {
    "versions": _versions,
    "machine": _machine,
    "GPUs": _gpus,
    "DeepSpeed": _deepspeed,
    "attention": _attention,
    "hub": _hub,
}


def _broken() -> Iterator[str]:
    """Libraries that denserl requires and that are absent, of another version, or cannot start."""
    from packaging.requirements import Requirement

    try:
        required = [Requirement(line) for line in metadata.requires("denserl") or []]
    except metadata.PackageNotFoundError:  # run from a checkout that was never installed
        required = []
    for one in required:
        if one.marker is not None and not one.marker.evaluate({"extra": ""}):
            continue
        try:
            found = metadata.version(one.name)
        except metadata.PackageNotFoundError:
            yield f"{one.name} is not installed, {one.specifier} is needed"
            continue
        if not one.specifier.contains(found, prereleases=True):
            yield f"{one.name} {found} is installed, {one.specifier} is needed"
    for name in ("torch", "transformers", "datasets"):
        try:
            __import__(name)
        except Exception as error:  # as above
            yield f"{name} cannot be imported: {_first_line(error)}"


def redactor() -> Callable[[str], str]:
    """A function that replaces the names of home, user and host in a text."""
    swaps = []
    home = Path(os.path.expanduser("~"))  # Path.home() raises where a user has none
    if home.is_absolute() and home != Path(home.anchor):
        swaps.append((rf"{re.escape(str(home))}(?=/|\b|$)", "~"))
    with suppress(OSError, KeyError):  # a user without a name
        swaps.append((rf"(?<![\w.-]){re.escape(getpass.getuser())}(?![\w-]|\.\w)", "USER"))
    if host := socket.gethostname():
        swaps.append((rf"\b{re.escape(host)}\b", "HOST"))

    def redact(text: str) -> str:
        for pattern, word in swaps:
            text = re.sub(pattern, word, text)
        return text

    return redact


def _hub_cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _extensions() -> Path:
    """Where torch keeps the extensions that it has compiled."""
    named = os.environ.get("TORCH_EXTENSIONS_DIR")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    return Path(named).parent if named else cache / "torch_extensions"


def _path() -> str:
    """The PATH with the programs of this Python's environment, which DeepSpeed finds too."""
    return os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])


def _gib(count: int) -> str:
    return f"{count / GIB:.1f} GiB"


def _first_line(error: BaseException) -> str:
    said = str(error).strip()
    return f"{type(error).__name__}: {said.splitlines()[0]}" if said else type(error).__name__
