"""A vLLM server as this process sees it: requests by HTTP, checked answers, readable failures."""

from __future__ import annotations

import http.client
import json
import os
import re
import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np

from denserl_cli.core.errors import DenserlError, ServiceError
from denserl_cli.core.sampling.base import Progress, Request, Response, Sampling

OLDEST = (0, 32)
"""The first release of vLLM whose answers name the version of the weights."""
AT_ONCE = 256
"""Requests that wait for an answer at the same time; vLLM puts them into batches itself."""
_QUICK, _SLOW = 10.0, 3600.0
"""Seconds to wait: for what is answered at once, and for what waits its turn or moves weights."""


class ServerFacts(NamedTuple):
    """What a server says about itself.

    Attributes:
        version: Of vLLM.
        model: The name or folder of what it serves.
        max_length: The most tokens of a prompt and its response.
        dtype: Of its weights, such as bfloat16.
        logprobs: Which log-probabilities it returns.
        backend: How it takes weights; None where it does not.
        device: cpu or cuda.
        chunked: Whether it may read a prompt in several pieces.
        workers: Processes that hold its weights.
    """

    version: str
    model: str
    max_length: int
    dtype: str
    logprobs: str
    backend: str | None
    device: str
    chunked: bool
    workers: int


class Server:
    """A vLLM server that runs, named by an address or by a socket file of this machine."""

    def __init__(self, address: str) -> None:
        """Name a server; nothing is sent yet.

        Args:
            address: Such as http://localhost:8000, or the path of a socket.
        """
        self.address = address.rstrip("/")

    def facts(self) -> ServerFacts:
        """Ask a server what it is.

        Raises:
            DenserlError: There is none, it is no vLLM, too old, or cannot be given weights.
        """
        version = self._version()
        try:
            info = self.ask("GET", "/server_info?config_format=json", wait=60.0)["vllm_config"]
        except ServerRefusal as refusal:
            raise DenserlError(
                f"the server at {self.address} takes no weights: vLLM's development mode is off",
                hint=_START,
            ) from refusal
        try:
            self.ask("POST", "/inference/v1/generate", {}, wait=_QUICK)
        except ServerRefusal as refusal:
            if refusal.status == 403:
                raise DenserlError(
                    f"the server at {self.address} does not take token ids: {refusal.text}",
                    hint=_START,
                ) from refusal
        model, transfer = info["model_config"], info["weight_transfer_config"]
        return ServerFacts(
            version=version,
            model=model["model"],
            max_length=model["max_model_len"],
            dtype=model["dtype"].removeprefix("torch."),
            logprobs=model["logprobs_mode"],
            backend=None if transfer is None else transfer["backend"],
            device=info["device_config"]["device"].partition(":")[0],
            chunked=info["scheduler_config"]["enable_chunked_prefill"],
            workers=self.ask("GET", "/get_world_size", wait=_QUICK)["world_size"],
        )

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """Send a JSON object; returns the answer. For what may take long."""
        return self.ask("POST", path, body)

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, version: str, progress: Progress
    ) -> list[Response]:
        """Sample responses with weights of a known version.

        Args:
            requests: What is wanted.
            sampling: How tokens are drawn.
            version: Of the weights that the server must have.
            progress: Called with the number of responses that have just been finished.

        Raises:
            ServiceError: The server is gone, fails, or has other weights.
        """
        found: list[Response | None] = [None] * len(requests)
        pool = ThreadPoolExecutor(max(1, min(AT_ONCE, len(requests))))
        try:
            asked = {
                pool.submit(self._generate, request, sampling, version): place
                for place, request in enumerate(requests)
            }
            for answer in as_completed(asked):
                found[asked[answer]] = answer.result()
                progress(1)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        return [response for response in found if response is not None]

    def _generate(self, request: Request, sampling: Sampling, version: str) -> Response:
        greedy = sampling.temperature == 0
        body = {
            "token_ids": request.prompt.tolist(),
            "sampling_params": {
                "max_tokens": request.limit,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "top_k": 0,
                "min_p": 0.0,
                "seed": None if greedy else seed_of(request.key),
                "stop_token_ids": list(sampling.stop_ids),
                "ignore_eos": True,
                "logprobs": 0,
                "detokenize": False,
            },
        }
        choice = self.ask("POST", "/inference/v1/generate", body)["choices"][0]
        if choice["finish_reason"] not in ("stop", "length"):
            raise self.lost(f"ended a response by {choice['finish_reason']!r}")
        versions = {span["version"] for span in choice["weight_versions"] or []}
        if versions != {version}:
            raise self.lost(
                f"answered with weights {', '.join(sorted(versions)) or 'of no version'} instead "
                f"of {version}: another job gives it weights, or it was started again"
            )
        ids = np.array(choice["token_ids"], np.int32)
        logprobs = np.array([token["logprob"] for token in choice["logprobs"]["content"]])
        if greedy:
            logprobs = np.zeros(len(ids))  # of a choice without alternatives
        return Response(ids, choice["finish_reason"] == "stop", logprobs.astype(np.float32))

    def ask(
        self, method: str, path: str, body: dict[str, Any] | None = None, wait: float = _SLOW
    ) -> Any:
        """Send a request and read the JSON of the answer.

        Raises:
            ServerRefusal: The answer says no.
            ServiceError: There is no answer.
        """
        connection = self._connection(wait)
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("VLLM_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        try:
            content = None if body is None else json.dumps(body).encode()
            connection.request(method, path, content, headers)
            answer = connection.getresponse()
            text = answer.read().decode(errors="replace")
        except (OSError, http.client.HTTPException) as error:
            raise self.lost(f"does not answer ({error or type(error).__name__})") from error
        finally:
            connection.close()
        if answer.status != 200:
            raise ServerRefusal(self, path, answer.status, text)
        try:
            return json.loads(text) if text else None
        except ValueError as error:
            raise self.lost(f"answers {path} with something else than JSON") from error

    def lost(self, what: str) -> ServiceError:
        """The error of a server that does something wrong, or nothing any more."""
        return ServiceError(
            f"the vLLM server at {self.address} {what}",
            hint="see its log, start it again, and go on with --resume",
        )

    def _connection(self, wait: float) -> http.client.HTTPConnection:
        if "://" not in self.address:
            return _SocketConnection(self.address, wait)
        parts = urlsplit(self.address)
        kind = (
            http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        )
        return kind(parts.hostname or "", parts.port, timeout=wait)

    def _version(self) -> str:
        """The server's release; DenserlError where there is no server, or it is too old."""
        try:
            version = str(self.ask("GET", "/version", wait=_QUICK)["version"])
        except ServerRefusal as refusal:
            raise DenserlError(
                f"what answers at {self.address} is no vLLM server", hint=_START
            ) from refusal
        except ServiceError as error:
            raise DenserlError(
                error.message, hint=f"set ppo.rollout.server to where it runs; {_START}"
            ) from error
        if release(version) < OLDEST:
            raise DenserlError(
                f"the server at {self.address} is vLLM {version}; "
                f"{'.'.join(map(str, OLDEST))} or newer is needed",
                hint="start a newer one there",
            )
        return version


_START = (
    "start it with: VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --enable-scale-out "
    '--logprobs-mode processed_logprobs --weight-transfer-config \'{"backend": "nccl"}\' '
    "(docs/rollouts.md)"
)


class ServerRefusal(ServiceError):
    """An answer that is not 200. status: its code. text: what it says."""

    def __init__(self, server: Server, path: str, status: int, text: str) -> None:
        self.status, self.text = status, _detail(text)
        about = server.lost(f"answers {path.partition('?')[0]} with {status}: {self.text}")
        super().__init__(about.message, about.hint)


class _SocketConnection(http.client.HTTPConnection):
    """HTTP over a socket file of this machine."""

    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self.path = path

    def connect(self) -> None:
        """Connect to the socket file."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self.path)


def seed_of(key: Sequence[int]) -> int:
    """The seed of a request: 63 bits from a response's key."""
    return int(np.random.SeedSequence(list(key)).generate_state(1, np.uint64)[0] >> np.uint64(1))


def release(version: str) -> tuple[int, ...]:
    """The first two numbers of a version, (0, 0) where it has none."""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    return tuple(map(int, numbers.groups())) if numbers else (0, 0)


def _detail(text: str) -> str:
    """What an answer says, without the JSON around it."""
    try:
        said = json.loads(text)
        said = said.get("error", said)
        return str(said["message"] if isinstance(said, dict) and "message" in said else said)
    except (ValueError, AttributeError):
        return text.strip()[:500] or "nothing"
