"""Stages of the tiny sandbox on a pretended GPU, one JSON object a case.

usage: python -m tests.pretend_gpu_worker FOLDER [CASE ...]

Without a case the pretended GPU tests itself. Whole stages take minutes and are run by hand.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections import Counter
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from denserl_cli.core.errors import Interrupted
from denserl_cli.core.observer import Observer
from denserl_cli.core.stages.run import run_stage
from tests import tiny
from tests.fakes import InterruptingObserver
from tests.pretend_gpu import DeviceFaultError, PretendedGpu, environment, pretend_gpu

STAGES = ("train-rm", "fit-function", "train-ppo")
SMALL = (
    *("sandbox.fit_steps=2", "sandbox.pairs=40", "normalizer.pairs=20"),
    *("ppo.iterations=3", "ppo.save_every=2", "ppo.eval_every=3"),
)
SHORT = ("ppo.iterations=2",)
DEEPSPEED = "kind: deepspeed, deepspeed: {zero_optimization: {reduce_bucket_size: 100000}}"
CASES: dict[str, tuple[str, ...]] = {
    "resumed": (),
    "checkpointing, frozen models offloaded": (
        "model.gradient_checkpointing=true",
        "ppo.engine={offload_frozen: true}",
    ),
    "lora": ("lora={rank: 2}",),
    "own rewards": (
        "ppo.rewards=[{source: values, weight: 0.5}, python:tests.reward_functions.variety]",
        *SHORT,
    ),
    "token": ("segmentation={granularity: token, cutoff: null}", *SHORT),
    "bandit": ("segmentation={granularity: bandit, cutoff: null}", *SHORT),
    "quantile": ("segmentation={cut: quantile, quantile: 0.8, cutoff: null}", *SHORT),
    "fixed": ("segmentation={cut: fixed, segment_length: 4, cutoff: null}", *SHORT),
    "random": ("segmentation={cut: random, segment_length: 4, cutoff: null}", *SHORT),
    "newline": ("segmentation={cut: newline, cutoff: null}", "normalizer.kind=global", *SHORT),
    **{
        f"zero {stage}": (
            f"reward_model.engine={{zero_stage: {stage}, {DEEPSPEED}}}",
            f"ppo.engine={{zero_stage: {stage}, {DEEPSPEED}}}",
        )
        for stage in (1, 2, 3)
    },
}


class Steps(Observer):
    """Notes how often the host has waited by the end of each step."""

    def __init__(self, gpu: PretendedGpu) -> None:
        self.gpu = gpu
        self.waits: list[Counter[tuple[str, str]]] = []

    def metrics(self, step: int, metrics: Mapping[str, Any]) -> None:
        self.waits.append(Counter(self.gpu.syncs))

    def fewest(self) -> dict[str, int]:
        """The waits of the step that had fewest, which nothing was evaluated or saved in.

        Those of sampling, which are counted by themselves, and of saving are left out.
        """
        steps = [after - before for before, after in pairwise(self.waits)]
        apart = ("sampling", "saving")
        kept = [
            {
                f"{what}, {line}": count
                for (what, line), count in step.items()
                if not any(name in line for name in apart)
            }
            for step in steps
        ]
        return min(kept, key=lambda step: sum(step.values()), default={})


def run(case: str, folder: Path) -> dict[str, Any]:
    """Every stage of a case; how often the host waited in a step and for a sampled token."""
    recipe = tiny.recipe(*SMALL, *CASES[case])
    found: dict[str, Any] = {"case": case}
    with pretend_gpu() as gpu:
        for stage in STAGES:
            steps, mode = Steps(gpu), "start"
            if case == "resumed" and stage != "fit-function":
                interrupt(stage, recipe, folder)
                mode = "resume"
            run_stage(stage, recipe, folder, mode, steps)
            found[stage] = steps.fewest()
        waits, passes = sampling(gpu)
    return found | {"sampling": {"waits": waits, "passes": passes}}


def sampling(gpu: PretendedGpu) -> tuple[int, int]:
    """How often the host waited while responses were sampled, and the passes of the model."""
    waits = sum(count for (_, line), count in gpu.syncs.items() if "sampling" in line)
    launches = gpu.launches.items()
    passes = (n for (name, line), n in launches if name == "embedding" and "sampling" in line)
    return waits, sum(passes)


def interrupt(stage: str, recipe: Any, folder: Path) -> None:
    """Begin a stage and press Ctrl-C."""
    title = {"train-rm": "train the reward model", "train-ppo": "train the policy"}[stage]
    try:
        run_stage(stage, recipe, folder, "start", InterruptingObserver(1, title))
    except Interrupted:
        return
    raise SystemExit(f"{stage} was not interrupted")


def check_itself() -> None:
    """Faults and waits are noticed, and a graph does what was recorded."""
    with pretend_gpu() as gpu:
        ours, theirs = torch.ones(3, device="cuda"), torch.ones(3)
        wrong = [lambda: ours + theirs, lambda: theirs[ours.long()], lambda: theirs + ours.sum()]
        for fault in (*wrong, ours.numpy):
            with pytest.raises(DeviceFaultError):
                fault()
        with torch.device("meta"):  # transformers asks so whether it is to draw weights
            assert torch.tensor([]).is_meta
        assert (ours * 2.0).sum().item() == 6 and sum(gpu.syncs.values()) == 1
        graph, total = torch.cuda.CUDAGraph(), torch.zeros(3, device="cuda")
        with torch.cuda.graph(graph):
            total.add_(ours * 2)
        graph.replay()
        graph.replay()
        assert total.tolist() == [4.0, 4.0, 4.0]
        with pytest.raises(DeviceFaultError), torch.cuda.graph(torch.cuda.CUDAGraph()):
            total.sum().item()


def main() -> None:
    """Run the cases; one that fails says why, and the others go on."""
    folder = Path(sys.argv[1])
    if "LD_PRELOAD" not in os.environ:  # it is compiled, and there when torch looks for a GPU
        folder.mkdir(parents=True, exist_ok=True)
        words = [sys.executable, "-m", "tests.pretend_gpu_worker", *sys.argv[1:]]
        os.execve(sys.executable, words, environment(folder))
    check_itself()
    for number, case in enumerate(sys.argv[2:]):
        try:
            found = run(case, folder / str(number))
        except Exception:
            found = {"case": case, "failed": traceback.format_exc()}
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
