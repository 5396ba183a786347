"""The engine `vllm` beside `torch` on a real model and real prompts: tokens a second, and equality.

    python benchmarks/rollout_vllm.py --model DIR --pairs train.jsonl [--responses 64] \
        [--tokens 128] [--dtype bfloat16] [--rounds 2] [--quick]

The first prompts of the pairs, sampled at temperature 1 with the chat template of the model. Both
engines take turns in one process, vLLM in its own processes beside it; the first round of each does
not count. Handing over the weights is timed apart. `apart` is the mean difference of an engine's
log-probabilities and the trainer's, in nats a token. Runs in the environment of `make test-vllm`,
which is made the first time. Prints a Markdown table, and the same as JSON on the last line.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
PYTHON = ROOT / ".venv-vllm" / "bin" / "python"


def in_environment_with_vllm() -> None:
    """Go on in an environment that has vLLM; make it where it is absent."""
    if importlib.util.find_spec("vllm") is not None:
        return
    subprocess.run(["make", "-C", str(ROOT), ".venv-vllm/installed"], check=True, stdout=sys.stderr)
    os.execv(PYTHON, [str(PYTHON), *sys.argv])


def main() -> None:
    """Measure in turns and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--pairs", type=Path, required=True)
    parser.add_argument("--responses", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="small numbers, to see that it works")
    asked = parser.parse_args()
    if asked.quick:
        asked.responses, asked.tokens, asked.rounds = 4, 8, 1
    in_environment_with_vllm()
    rows = measure(asked)
    print("| engine | tokens a second | weights handed over in | apart |\n|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['engine']} | {row['tokens_per_second']:.0f} | {row['update_seconds']:.2f} s | "
            f"{row['apart']:.1e} |"
        )
    print(json.dumps(rows))


def measure(asked: argparse.Namespace) -> list[dict[str, Any]]:
    """The figures of both engines."""
    import torch

    from denserl_cli.core.chat.loading import load_chat
    from denserl_cli.core.data.conversations import read_pairs
    from denserl_cli.core.engine.frozen import LocalModel
    from denserl_cli.core.models.causal_lm import load_causal_lm
    from denserl_cli.core.recipe.schema import ModelConfig, Recipe, RolloutConfig, Source
    from denserl_cli.core.sampling.base import Sampling
    from denserl_cli.core.sampling.sampler import make_sampler

    recipe = Recipe(name="rollout", model=ModelConfig(path=asked.model, dtype=asked.dtype))
    _, chat = load_chat(recipe)
    pairs = read_pairs([Source(str(asked.pairs))], seed=0).pairs[: asked.responses]
    prompts = [np.array(chat.encode_prompt(pair.chosen[:-1]), np.int32) for pair in pairs]
    policy = LocalModel(load_causal_lm(recipe.model, trained=False), getattr(torch, asked.dtype))
    sampling = Sampling(asked.tokens, chat.stop_ids)
    keys = [(0, row) for row in range(len(prompts))]
    samplers = {}
    for engine in ("torch", "vllm"):
        rollout = RolloutConfig(engine=engine, rows=asked.responses, memory_share=0.3)
        named = replace(recipe, ppo=replace(recipe.ppo, rollout=rollout))
        longest = max(map(len, prompts)) + asked.tokens
        samplers[engine] = make_sampler(named, policy, pad_id=chat.pad_id, max_length=longest)
    speeds: dict[str, list[float]] = {engine: [] for engine in samplers}
    updates: dict[str, list[float]] = {engine: [] for engine in samplers}
    apart = {}
    for _ in range(asked.rounds + 1):
        for engine, sampler in samplers.items():
            sampler.refresh()
            began = time.perf_counter()
            sampler.sample([], [], sampling)  # a late engine takes the weights now
            updates[engine].append(time.perf_counter() - began)
            began = time.perf_counter()
            drawn = sampler.sample(prompts, keys, sampling)
            taken = time.perf_counter() - began
            speeds[engine].append(sum(len(one.ids) for one in drawn) / taken)
            apart[engine] = difference(policy, prompts, drawn, chat.pad_id)
    for sampler in samplers.values():
        sampler.close()
    return [
        {
            "engine": engine,
            "tokens_per_second": statistics.median(speeds[engine][1:]),
            "update_seconds": statistics.median(updates[engine][1:]),
            "apart": apart[engine],
        }
        for engine in samplers
    ]


def difference(policy: Any, prompts: list[np.ndarray], drawn: list[Any], pad_id: int) -> float:
    """Mean difference of the drawn log-probabilities and the policy's own, nats a token."""
    import torch

    from denserl_cli.core.data.batches import collate_sequences
    from denserl_cli.core.models.causal_lm import response_logprobs

    total = tokens = 0.0
    for start in range(0, len(drawn), 8):
        part = drawn[start : start + 8]
        batch = collate_sequences(prompts[start : start + 8], [one.ids for one in part], pad_id)
        with torch.no_grad():
            own = policy(response_logprobs, batch, with_entropy=False).logprobs
        for row, one in enumerate(part):
            theirs = torch.from_numpy(one.logprobs)
            total += float((own[row, : len(one.ids)] - theirs).abs().sum())
            tokens += len(one.ids)
    return total / tokens


if __name__ == "__main__":
    main()
