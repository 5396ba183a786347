"""The sampling engine `vllm`: responses from vLLM, in a process beside each one or on a server.

One client speaks to both. New weights go over by vLLM's public weight transfer alone, the prefix
cache is emptied after each of them (it would answer with what the old weights computed), and every
response says which weights it comes from.
"""

from __future__ import annotations

import tempfile
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from denserl_cli.core.data.batches import collate_sequences
from denserl_cli.core.errors import DenserlError, ServiceError
from denserl_cli.core.models.causal_lm import response_logprobs
from denserl_cli.core.sampling.base import Progress, Request, Response, Sampling
from denserl_cli.core.sampling.vllm_plugin import BACKEND
from denserl_cli.core.sampling.vllm_process import VllmProcess, refuse_absent_vllm, remedy
from denserl_cli.core.sampling.vllm_server import Server, ServerFacts, ServerRefusal
from denserl_cli.core.sampling.vllm_transfer import (
    FileTransfer,
    IpcTransfer,
    NcclTransfer,
    WeightTransfer,
)
from denserl_cli.core.sampling.vllm_weights import weight_buckets
from denserl_cli.core.system.distributed import all_gather_object, is_main_process

if TYPE_CHECKING:
    from denserl_cli.core.engine.base import Engine
    from denserl_cli.core.engine.frozen import LocalModel
    from denserl_cli.core.recipe.schema import RolloutConfig

PROBE_TOKENS = 8
"""Tokens whose log-probabilities show, once, that policy and server compute the same."""
TOLERANCE = {torch.float32: 1e-3}
"""Mean difference of those log-probabilities, in nats, that is rounding; otherwise `_ROUGH`."""
_ROUGH = 0.5


def check_vllm(settings: RolloutConfig, *, max_length: int) -> None:
    """See, before a model is loaded, that the vLLM which a recipe asks for is there and fits.

    Args:
        settings: Of the recipe.
        max_length: The most tokens of a prompt and its response.

    Raises:
        DenserlError: It is not, or does not.
    """
    if settings.server is None:
        refuse_absent_vllm()
        return
    failure: DenserlError | None = None
    if is_main_process():
        try:
            facts = Server(settings.server).facts()
            _refuse_unfit(settings, facts, max_length)
        except DenserlError as error:
            failure = error
    _agree(failure)


def _refuse_unfit(settings: RolloutConfig, facts: ServerFacts, max_length: int) -> None:
    """Raise DenserlError, with all that is wrong, for a server that does not fit a recipe."""
    wrong = []
    if facts.max_length < max_length:
        wrong.append(
            f"it takes {facts.max_length} tokens of prompt and response, the recipe has up to "
            f"{max_length}: start it with --max-model-len {max_length}, or lower "
            "ppo.max_prompt_length or ppo.rollout.max_new_tokens"
        )
    if facts.backend not in ("nccl", BACKEND):
        wrong.append(
            f"it takes new weights by {facts.backend or 'nothing'}: start it with "
            '--weight-transfer-config \'{"backend": "nccl"}\', or '
            f'\'{{"backend": "{BACKEND}"}}\' where neither side has a GPU'
        )
    if facts.backend == "nccl" and not torch.cuda.is_available():
        wrong.append("it takes new weights by NCCL, and this process has no GPU")
    altered = settings.temperature not in (0.0, 1.0) or settings.top_p < 1
    if altered and facts.logprobs != "processed_logprobs":
        wrong.append(
            "its log-probabilities leave temperature and top_p out: start it with --logprobs-mode "
            "processed_logprobs"
        )
    if facts.device == "cpu" and facts.chunked and settings.temperature != 0:
        wrong.append(
            "on a CPU it cannot read a seeded prompt in pieces: start it with "
            "--no-enable-chunked-prefill"
        )
    if wrong:
        raise DenserlError(
            "\n".join([f"ppo.rollout.server: the vLLM at {settings.server} does not fit:", *wrong]),
            hint="start it as docs/rollouts.md shows",
        )


class VllmSampling:
    """Samples from the policy by vLLM; its interface is `SamplingEngine`'s."""

    exact = False

    def __init__(
        self, policy: Engine | LocalModel, settings: RolloutConfig, *, pad_id: int, max_length: int
    ) -> None:
        """Start a vLLM for this process, or use the server that the settings name.

        Args:
            policy: What responses are sampled from.
            settings: Of the recipe.
            pad_id: Token that fills batches up.
            max_length: The most tokens of a prompt and its response.
        """
        self.policy, self.pad_id = policy, pad_id
        self.dtype = policy.compute_dtype
        self.process: VllmProcess | None = None
        self.files = tempfile.TemporaryDirectory(prefix="denserl-weights-")
        self.job, self.updates = uuid.uuid4().hex[:8], 0
        self.stale, self.sleeps, self.probed = True, False, False
        self.asleep = False
        start = self._start if settings.server is None else self._meet
        _everywhere(lambda: start(settings, max_length))

    def _start(self, settings: RolloutConfig, max_length: int) -> None:
        """Start a vLLM of this process's own, of the policy's configuration."""
        refuse_absent_vllm()
        config = self.policy.model.config
        self.process = VllmProcess(settings, config, dtype=self.dtype, max_length=max_length)
        self.server, self.sends = self.process.server, True
        self.served, self.same_type = f"the policy's own {config.model_type}", True
        self.sleeps = self.policy.device.type == "cuda"
        self.transfer: WeightTransfer = self._files()
        if self.sleeps:
            self.transfer = IpcTransfer(self.server.post)
        self.transfer.connect()

    def _meet(self, settings: RolloutConfig, max_length: int) -> None:
        """Find the server that the settings name, and agree on how weights travel."""
        self.server, self.sends = Server(settings.server or ""), is_main_process()
        facts = self.server.facts()
        _refuse_unfit(settings, facts, max_length)
        self.served = facts.model
        self.same_type = facts.dtype == str(self.dtype).removeprefix("torch.")
        self.transfer = self._files()
        if facts.backend == "nccl":
            self.transfer = NcclTransfer(self.server.post, facts.workers)
        if self.sends:
            self.transfer.connect()

    def _files(self) -> FileTransfer:
        return FileTransfer(self.server.post, Path(self.files.name))

    @property
    def version(self) -> str:
        """The name of the weights that were sent last."""
        return f"denserl-{self.job}-{self.updates}"

    def refresh(self) -> None:
        """Note that the policy's weights have changed: the next `sample` sends them."""
        self.stale = True

    def sample(
        self, requests: Sequence[Request], sampling: Sampling, progress: Progress
    ) -> list[Response]:
        """The responses in the order of the requests, of which there may be none.

        Raises:
            ServiceError: In every process alike: vLLM is gone or fails.
        """
        if self.stale or self.asleep:
            self._send_weights()
        if not self.probed:
            self._probe()
        found: list[Response] = []
        _everywhere(lambda: found.extend(self._generate(requests, sampling, progress)))
        if self.sleeps:
            _everywhere(self._sleep)
        return found

    def close(self) -> None:
        """End a vLLM of this process's own; a server is left as it is."""
        if self.process is not None:
            self.process.close()
        self.files.cleanup()

    def _generate(
        self, requests: Sequence[Request], sampling: Sampling, progress: Progress
    ) -> list[Response]:
        try:
            return self.server.generate(requests, sampling, self.version, progress)
        except ServiceError as error:
            if self.process is None:
                raise
            cause = self.process.cause()
            raise ServiceError(
                f"the vLLM of this process failed: {cause}", hint=remedy(cause)
            ) from error

    def _sleep(self) -> None:
        """Give the GPU's memory back; the weights come from the policy again."""
        self.server.post("/sleep?level=2", {})
        self.asleep = True

    def _send_weights(self) -> None:
        """Hand over all weights and name them; every process takes part in gathering them."""
        self.updates += 1
        self.job = _first(self.job)
        _everywhere(self._begin)
        failure: DenserlError | None = None
        for bucket in weight_buckets(self.policy, self.dtype):
            if self.sends and failure is None:
                try:
                    self.transfer.send(bucket)
                except DenserlError as error:
                    failure = error  # the others are gathering: go through the rest with them
        _agree(self._refused(failure) if isinstance(failure, ServerRefusal) else failure)
        _everywhere(self._finish)
        self.stale = self.asleep = False

    def _begin(self) -> None:
        if not self.sends:
            return
        if self.asleep:
            self.server.post("/wake_up?tags=weights", {})
        else:
            self.server.post("/pause?mode=wait&clear_cache=false", {})
        try:
            self.server.post("/start_weight_update", {})
        except ServerRefusal:  # an update was begun by a job that has died since
            self.server.post("/finish_weight_update", {})
            self.server.post("/start_weight_update", {})

    def _finish(self) -> None:
        if not self.sends:
            return
        self.server.post("/finish_weight_update", {"weight_version": self.version})
        if self.asleep:
            self.server.post("/wake_up?tags=kv_cache", {})
        self._empty_cache()
        self.server.post("/resume", {})

    def _empty_cache(self) -> None:
        """Forget what the old weights computed of prompts that may come again."""
        if not self.server.post("/reset_prefix_cache", {})["success"]:
            raise self.server.lost("did not empty its prefix cache: other requests are running")

    def _refused(self, error: ServerRefusal) -> ServiceError:
        return ServiceError(
            f"vLLM did not take the policy's weights: {error.message}",
            hint=f"it serves {self.served}: start it with the recipe's model; where that is so, "
            "vLLM does not know this architecture: set ppo.rollout.engine=torch",
        )

    def _probe(self) -> None:
        """See once that the server computes what the policy computes.

        Raises:
            DenserlError: It does not, so the weights did not arrive, or it is another model.
        """
        size = self.policy.model.config.get_text_config().vocab_size
        prompt = (np.arange(1, PROBE_TOKENS + 1) % size).astype(np.int32)
        request = Request(prompt, (0,), PROBE_TOKENS)
        found: list[Response] = []
        _everywhere(
            lambda: found.extend(
                self._generate([request], Sampling(PROBE_TOKENS, ()), lambda _: None)
            )
        )
        batch = collate_sequences([prompt], [found[0].ids], self.pad_id, self.policy.device)
        with torch.no_grad():
            own = self.policy(response_logprobs, batch, with_entropy=False).logprobs[0]
        apart = float((own.float().cpu() - torch.from_numpy(found[0].logprobs)).abs().mean())
        allowed = TOLERANCE.get(self.dtype, _ROUGH) if self.same_type else _ROUGH
        wrong = None
        if not apart <= allowed:
            wrong = DenserlError(
                f"vLLM and the policy do not compute the same: log-probabilities of the same "
                f"tokens differ by {apart:.3g} nats in the mean ({allowed:g} is rounding)",
                hint=f"vLLM serves {self.served}: start it with the recipe's model; where that is "
                "so, set ppo.rollout.engine=torch",
            )
        _agree(wrong)
        self.probed = True


def _everywhere(step: Callable[[], Any]) -> None:
    """Do a step in every process; where it fails in one, all of them raise that error."""
    failure: DenserlError | None = None
    try:
        step()
    except DenserlError as error:
        failure = error
    _agree(failure)


def _agree(failure: DenserlError | None) -> None:
    """Raise, in every process, the error of the first process that has one."""
    for error in all_gather_object(failure if failure is None else _plain(failure)):
        if error is not None:
            raise error


def _plain(error: DenserlError) -> DenserlError:
    """The error as another process can receive it."""
    kind = ServiceError if isinstance(error, ServiceError) else DenserlError
    return kind(error.message, error.hint)


def _first(value: str) -> str:
    """The first process's value, in every process."""
    return str(all_gather_object(value)[0])
