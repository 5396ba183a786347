"""A process of `test_pretend_gpu.py`: stages of the tiny sandbox on a pretended GPU.

usage: python -m tests.pretend_gpu_worker FOLDER CASE ...; prints one JSON object a case
"""

from __future__ import annotations

import json
import sys
import traceback
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from denserl_cli.core.errors import Interrupted
from denserl_cli.core.observer import Observer
from denserl_cli.core.runs.folder import Mode
from denserl_cli.core.stages.run import run_stage
from tests import tiny
from tests.fakes import InterruptingObserver
from tests.pretend_gpu import PretendedGpu, pretend_gpu

STAGES = ("train-rm", "fit-function", "train-ppo")
SMALL = ("sandbox.fit_steps=20", "ppo.iterations=3", "ppo.save_every=2", "ppo.eval_every=3")
DEEPSPEED = "kind: deepspeed, deepspeed: {zero_optimization: {reduce_bucket_size: 100000}}"
CASES: dict[str, tuple[str, ...]] = {
    "all": (),
    "checkpointing": ("model.gradient_checkpointing=true", "ppo.engine={offload_frozen: true}"),
    "lora": ("lora={rank: 2}",),
    "own rewards": (
        "ppo.rewards=[{function: tests.reward_functions:variety, weight: 0.1}]",
        "ppo.reward_model_weight=0.5",
    ),
    "token": ("segmentation.granularity=token",),
    "bandit": ("segmentation.granularity=bandit",),
    "quantile": ("segmentation={cut: quantile, quantile: 0.8, cutoff: null}",),
    "fixed": ("segmentation={cut: fixed, segment_length: 4, cutoff: null}",),
    "random": ("segmentation={cut: random, segment_length: 4, cutoff: null}",),
    "lines": ("segmentation={cut: lines, cutoff: null}",),
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


def run(case: str, folder: Path) -> dict[str, Any]:
    """Every stage of a case; what it left, and how often the host waited."""
    recipe = tiny.recipe(*SMALL, *CASES[case])
    found: dict[str, Any] = {"case": case}
    with pretend_gpu() as gpu:
        for stage in STAGES:
            steps = Steps(gpu)
            if case == "all" and stage != "fit-function":
                interrupt(stage, recipe, folder)
            mode: Mode = "resume" if case == "all" and stage != "fit-function" else "start"
            run_stage(stage, recipe, folder, mode, steps)
            last = steps.waits[-1] - steps.waits[-2] if len(steps.waits) > 1 else Counter()
            found[stage] = {"step": {f"{what} {line}": n for (what, line), n in last.items()}}
        sampling = sum(count for (_, line), count in gpu.syncs.items() if "sampling" in line)
        passes = sum(
            count
            for (name, line), count in gpu.launches.items()
            if name == "embedding" and "sampling" in line
        )
    found["waits a token"] = sampling / max(1, passes)
    found["sampled tokens"] = passes
    return found


def interrupt(stage: str, recipe: Any, folder: Path) -> None:
    """Begin a stage and press Ctrl-C."""
    try:
        run_stage(stage, recipe, folder, "start", InterruptingObserver(2))
    except Interrupted:
        return
    raise SystemExit(f"{stage} was not interrupted")


def main() -> None:
    """Run the cases; one that fails says why, and the others go on."""
    folder = Path(sys.argv[1])
    for number, case in enumerate(sys.argv[2:]):
        try:
            found = run(case, folder / str(number))
        except Exception:
            found = {"case": case, "failed": traceback.format_exc()}
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
