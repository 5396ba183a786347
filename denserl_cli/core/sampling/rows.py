"""The rows of a batch in which responses are sampled side by side."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from denserl_cli.core.sampling.base import Request, Response, Sampling
from denserl_cli.core.sampling.draw import draw, noise


class Rows:
    """What has been drawn in each of R rows; the first `active` ones have a response each.

    Everything is on the device and stays where it is, so that a step can be recorded as a graph.
    """

    def __init__(self, count: int, sampling: Sampling, device: torch.device) -> None:
        """Make R empty rows.

        Args:
            count: R.
            sampling: How tokens are drawn.
            device: Where the model is.
        """
        self.sampling, self.active = sampling, 0
        self.numbers: list[int] = []
        """Which request each active row answers."""
        most = sampling.max_new_tokens
        self.stops = torch.tensor(sampling.stop_ids, dtype=torch.long, device=device)
        longs = (torch.zeros(count, dtype=torch.long, device=device) for _ in range(4))
        self.token, self.start, self.drawn, self.limit = longs
        self.done = torch.zeros(count, dtype=torch.bool, device=device)
        self.uniform = torch.zeros(count, most, dtype=torch.float64, device=device)
        # one more column takes what is drawn in rows that have ended
        self.ids = torch.zeros(count, most + 1, dtype=torch.long, device=device)
        self.logprobs, self.entropy = torch.zeros(2, count, most + 1, device=device)

    def admit(self, numbers: Sequence[int], requests: Sequence[Request], logits: Tensor) -> None:
        """Begin responses in the next free rows, and draw their first tokens.

        Args:
            numbers: Of the k requests.
            requests: The k requests.
            logits: (k, V) after their prompts.
        """
        part = slice(self.active, self.active + len(requests))
        values = {
            "start": [len(request.prompt) for request in requests],
            "limit": [request.limit for request in requests],
        }
        for name, given in values.items():
            held = getattr(self, name)
            held[part] = torch.tensor(given, device=held.device)
        keys = [request.key for request in requests]
        self.uniform[part] = noise(keys, self.sampling.max_new_tokens).to(self.uniform.device)
        self.drawn[part], self.done[part] = 0, False
        self.active = part.stop
        self.numbers += numbers
        self.take(part, logits)

    def take(self, part: slice, logits: Tensor) -> None:
        """Draw the next token of some rows; nothing is kept of those that have ended.

        Args:
            part: The n rows.
            logits: (n, V) float32.
        """
        sampling, drawn, done = self.sampling, self.drawn[part], self.done[part]
        last = self.uniform.shape[1] - 1
        uniform = self.uniform[part].gather(1, drawn.clamp(max=last)[:, None])[:, 0]
        found = draw(logits, uniform, temperature=sampling.temperature, top_p=sampling.top_p)
        column = torch.where(done, last + 1, drawn)[:, None]
        self.ids[part].scatter_(1, column, found.ids[:, None])
        self.logprobs[part].scatter_(1, column, found.logprobs[:, None])
        self.entropy[part].scatter_(1, column, found.entropy[:, None])
        self.token[part] = found.ids
        drawn += ~done
        done |= torch.isin(found.ids, self.stops) | (drawn >= self.limit[part])

    @property
    def places(self) -> Tensor:
        """(active,) the column of each row's latest token."""
        part = slice(self.active)
        return self.start[part] + self.drawn[part] - 1

    def leave(self, ended: Sequence[int]) -> tuple[dict[int, Response], Tensor, Tensor]:
        """Take the responses of rows that have ended; the last rows move into their places.

        Args:
            ended: Rows.

        Returns:
            The responses by the numbers of their requests, and which rows moved where.
        """
        found = self._responses(ended)
        left = self.active - len(ended)
        target = [row for row in ended if row < left]
        gone = set(ended)
        source = [row for row in range(left, self.active) if row not in gone]
        for old, new in zip(source, target, strict=True):
            self.numbers[new] = self.numbers[old]
        del self.numbers[left:]
        self.active = left
        device = self.token.device
        moved = torch.tensor(source, device=device), torch.tensor(target, device=device)
        if source:
            for name in ("token", "start", "drawn", "limit", "done", "uniform"):
                held = getattr(self, name)
                held[moved[1]] = held[moved[0]]
            for held in (self.ids, self.logprobs, self.entropy):
                held[moved[1]] = held[moved[0]]
        return found, *moved

    def _responses(self, ended: Sequence[int]) -> dict[int, Response]:
        rows = torch.tensor(ended, device=self.token.device)
        counts = self.drawn[rows].tolist()
        tensors = (held[rows, : max(counts)] for held in (self.ids, self.logprobs, self.entropy))
        ids, logprobs, entropy = (tensor.cpu().numpy() for tensor in tensors)
        return {
            self.numbers[row]: Response(
                ids[place, :count].astype(np.int32),
                int(ids[place, count - 1]) in self.sampling.stop_ids,
                logprobs[place, :count].copy(),
                entropy[place, :count].copy(),
            )
            for place, (row, count) in enumerate(zip(ended, counts, strict=True))
        }
