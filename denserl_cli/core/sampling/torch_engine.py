"""Sampling with the policy itself, in this process: rows of a batch that are filled again."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from denserl_cli.core.data.batches import by_length
from denserl_cli.core.errors import DenserlError
from denserl_cli.core.models.device import autocast
from denserl_cli.core.sampling.base import Progress, Request, Response, Sampling
from denserl_cli.core.sampling.cache import STEP, RowCache
from denserl_cli.core.sampling.decoder import Decoder, weights_in
from denserl_cli.core.sampling.graphs import Graphs
from denserl_cli.core.sampling.limits import MOST_ROWS, PROMPT_TOKENS
from denserl_cli.core.sampling.padded import sample_padded
from denserl_cli.core.sampling.rows import Rows
from denserl_cli.core.system.distributed import local_world_size

if TYPE_CHECKING:
    from denserl_cli.core.engine.base import Engine
    from denserl_cli.core.engine.frozen import LocalModel

MEMORY_SHARE = 0.5
"""Share of the free memory that the cache may take where a recipe does not say the rows."""
PADDED_ROWS = 16
"""Rows of a padded batch."""
LOOK = {"cpu": 1, "cuda": 16}
"""Tokens between two looks at which rows have ended: on CUDA each one waits for the device."""

_log = logging.getLogger(__name__)


class TorchSampling:
    """Samples from a policy that this process trains or holds."""

    def __init__(self, policy: Engine | LocalModel, *, rows: int | None, pad_id: int) -> None:
        """Set up the engine.

        Args:
            policy: What responses are sampled from.
            rows: Responses that are sampled side by side; None: as many as memory allows.
            pad_id: Token that fills batches up.
        """
        self.policy, self.rows, self.pad_id = policy, rows, pad_id
        self.exact = policy.compute_dtype is torch.float32

    def refresh(self) -> None:
        """Do nothing: the weights are the policy's own."""

    def close(self) -> None:
        """Do nothing: nothing was started."""

    @torch.no_grad()
    def sample(
        self, requests: Sequence[Request], sampling: Sampling, progress: Progress
    ) -> list[Response]:
        """The responses in the order of the requests."""
        dtype = self.policy.compute_dtype
        with self.policy.gathered() as model, _evaluating(model), weights_in(model, dtype):
            if not requests:
                return []
            decoder = Decoder(model)
            if not decoder.can_advance():
                return self._in_batches(model, requests, sampling, progress)
            columns = max(len(request.prompt) + request.limit for request in requests)
            rows = min(len(requests), self.rows or fitting_rows(decoder, columns))
            cache = RowCache(decoder.like, rows, columns)
            found = _Batch(decoder, cache, requests, sampling, progress).run()
        return [found[i] for i in range(len(requests))]

    def _in_batches(
        self, model: Any, requests: Sequence[Request], sampling: Sampling, progress: Progress
    ) -> list[Response]:
        found: dict[int, Response] = {}
        lengths = [len(request.prompt) for request in requests]
        for part in by_length(lengths, np.arange(len(requests)), self.rows or PADDED_ROWS):
            with autocast(self.policy.device, self.policy.compute_dtype):
                drawn = sample_padded(model, [requests[i] for i in part], sampling, self.pad_id)
            found |= zip(part.tolist(), drawn, strict=True)
            progress(len(part))
        return [found[i] for i in range(len(requests))]


def fitting_rows(decoder: Decoder, columns: int) -> int:
    """How many rows of so many columns fit into the free memory, at most `MOST_ROWS`.

    Raises:
        DenserlError: Not even one.
    """
    free = free_memory(decoder.device)
    row = RowCache.row_bytes(decoder.like, columns) + 16 * decoder.head.weight.shape[0]
    rows = int(MEMORY_SHARE * free / row)
    if not rows:
        raise DenserlError(
            f"the cache of one response of {columns} tokens takes {row / 1e9:.1f} GB, and "
            f"{free / 1e9:.1f} GB are free",
            hint="lower ppo.max_prompt_length or ppo.rollout.max_new_tokens",
        )
    return min(rows, MOST_ROWS)


def free_memory(device: torch.device) -> float:
    """Bytes that this process can still take on a device, or its part of the host's memory."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(torch.cuda.mem_get_info(device)[0] + kept)
    import psutil

    return psutil.virtual_memory().available / local_world_size()


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Hold a model in evaluation mode inside: gradient checkpointing would switch the cache off."""
    before = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(before)


class _Batch:
    """Rows, their cache, and the requests that wait for a place."""

    def __init__(
        self,
        decoder: Decoder,
        cache: RowCache,
        requests: Sequence[Request],
        sampling: Sampling,
        progress: Progress,
    ) -> None:
        self.decoder, self.cache, self.progress = decoder, cache, progress
        self.requests, self.waiting = requests, deque(range(len(requests)))
        self.count = cache.rows
        kind = decoder.device.type
        self.look, self.prompt_tokens = LOOK[kind], PROMPT_TOKENS[kind]
        self.rows = Rows(self.count, sampling, decoder.device)
        self.graphs = Graphs(decoder.device, _log.warning)
        self.found: dict[int, Response] = {}
        self.longest = 0
        """No row holds more columns."""

    def run(self) -> dict[int, Response]:
        """All responses, by the numbers of their requests."""
        few = max(1, self.count // 8)
        while self.waiting or self.rows.active:
            free = self.count - self.rows.active
            if self.waiting and free >= min(few, len(self.waiting)):
                self._admit(free)
            else:
                for _ in range(self.look):
                    self._step()
            self._collect()
        return self.found

    def _admit(self, free: int) -> None:
        """Read waiting prompts into free rows, as many at once as a pass may have."""
        width, numbers = 0, list[int]()
        while self.waiting and len(numbers) < free:
            width = max(width, len(self.requests[self.waiting[0]].prompt))
            if numbers and width * (len(numbers) + 1) > self.prompt_tokens:
                break
            numbers.append(self.waiting.popleft())
        requests = [self.requests[number] for number in numbers]
        states, layers = self.decoder.read([request.prompt for request in requests])
        self.cache.fill(self.rows.active, layers)
        self.rows.admit(numbers, requests, self.decoder.head(states))
        self.longest = max(self.longest, width + 1)

    def _step(self) -> None:
        """Read the latest token of every row and draw the next one."""
        active = self.rows.active
        width = min(-(-self.longest // STEP) * STEP, self.cache.columns)
        self.graphs.run((active, width), lambda: self._pass(active, width))
        self.longest += 1

    def _pass(self, active: int, width: int) -> None:
        part = slice(active)
        states = self.decoder.advance(self.cache, self.rows.token[part], self.rows.places, width)
        self.rows.take(part, self.decoder.head(states))

    def _collect(self) -> None:
        """Take the responses that have ended; the rows that go on stand together again."""
        done = self.rows.done[: self.rows.active].tolist()
        ended = [row for row, over in enumerate(done) if over]
        if not ended:
            return
        found, source, target = self.rows.leave(ended)
        if len(source):
            self.cache.move(source, target, min(self.longest, self.cache.columns))
        self.found |= found
        self.progress(len(ended))
        if self.rows.active:
            self.longest = int(self.rows.places.max()) + 1
