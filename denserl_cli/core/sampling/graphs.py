"""CUDA graphs: a step that is launched as a whole, and not kernel by kernel."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch


class Graphs:
    """Runs steps; on CUDA the second one of a kind is recorded and later ones are replayed.

    A step reads and writes tensors that stay where they are, and takes nothing to the host.
    """

    def __init__(self, device: torch.device, notice: Callable[[str], None]) -> None:
        """Set up without any graph.

        Args:
            device: Where steps run; elsewhere than on CUDA nothing is recorded.
            notice: Told when a step cannot be recorded.
        """
        self.enabled, self.notice = device.type == "cuda", notice
        self.graphs: dict[Hashable, torch.cuda.CUDAGraph | None] = {}
        self.pool: Any = None

    def run(self, kind: Hashable, step: Callable[[], None]) -> None:
        """Run a step.

        Args:
            kind: Everything that decides which kernels a step launches; equal for equal shapes.
            step: What to run.
        """
        if not self.enabled:
            step()
            return
        if kind not in self.graphs:  # kernels are chosen and loaded in a pass that counts
            step()
            self.graphs[kind] = None
            return
        graph = self.graphs[kind] or self._recorded(step)
        if graph is None:
            step()
            return
        self.graphs[kind] = graph
        graph.replay()

    def _recorded(self, step: Callable[[], None]) -> torch.cuda.CUDAGraph | None:
        """The graph of a step, which recording does not run; None where it cannot be recorded."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self.pool):
                step()
        except RuntimeError as error:
            self.enabled = False
            reason = str(error).partition("\n")[0]
            self.notice(f"sampling without CUDA graphs, which is slower: {reason}")
            return None
        self.pool = graph.pool()
        return graph
