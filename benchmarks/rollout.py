"""Rollouts on a real model and real prompts: this tree's sampling beside another tree's.

    python benchmarks/rollout.py --model DIR --pairs train.jsonl [--beside TREE] \
        [--dtype bfloat16 --dtype float32] [--rounds 2] [--skewed] [--where] [--quick]

Every way samples the same prompts with the same keys in a process of its own, in turns. `--beside`
names a folder that holds another state of this repository; `--skewed` gives every response a limit
of its own (log-normal, the longest ten times the median) and refills few rows; `--where` prints
where a step's time goes. Prints response tokens a second, wall and of CPU time, medians of rounds.
Python, torch and the kernels have as many threads as `--threads` says.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parents[1]
SIGMA = 0.9
"""Of the log-normal lengths: the longest of 64 is about ten times the median."""
KINDS = {
    "products": ("aten::mm", "aten::addmm", "aten::bmm"),
    "attention": ("aten::_scaled_dot_product", "aten::baddbmm"),
    "cache and copies": ("aten::cat", "aten::copy_", "aten::index", "aten::_index_put"),
    "drawing": ("aten::_softmax", "aten::sum", "aten::cumsum", "aten::searchsorted", "aten::isin"),
}


def main() -> None:
    """Measure in turns and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--pairs", type=Path, required=True)
    parser.add_argument("--beside", type=Path)
    parser.add_argument("--dtype", action="append", choices=["float32", "bfloat16"])
    parser.add_argument("--responses", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rows", type=int)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--skewed", action="store_true")
    parser.add_argument("--where", action="store_true")
    parser.add_argument("--quick", action="store_true", help="small numbers, to see that it works")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.case:
        print(json.dumps(measure(json.loads(asked.case))))
        return
    if asked.quick:
        asked.responses, asked.tokens, asked.rounds = 8, 8, 1
    trees = {"before": asked.beside, "now": HERE} if asked.beside else {"now": HERE}
    columns = ("numbers", "tree", "tokens", "tokens a second", "of CPU time", "rows busy")
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for dtype in asked.dtype or ["bfloat16", "float32"]:
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in trees}
        for _ in range(asked.rounds):
            for name, tree in trees.items():
                found[name].append(child(asked, tree, dtype))
        for name, rounds in found.items():
            wall, cpu = (statistics.median(one[key] for one in rounds) for key in ("wall", "cpu"))
            tokens, busy = rounds[0]["tokens"], rounds[0]["busy"]
            cells = (dtype, name, tokens, f"{tokens / wall:.0f}", f"{tokens / cpu:.0f}", busy)
            print(f"| {' | '.join(map(str, cells))} |", flush=True)
        for name, rounds in found.items() if asked.where else ():
            shares = ", ".join(f"{kind} {share:.0%}" for kind, share in rounds[0]["where"].items())
            print(f"\n{dtype}, {name}: {shares}\n")


def child(asked: argparse.Namespace, tree: Path, dtype: str) -> dict[str, Any]:
    """Measure one tree in a process of its own."""
    case = {
        "model": str(asked.model.absolute()),
        "pairs": str(asked.pairs.absolute()),
        "dtype": dtype,
        **{name: getattr(asked, name) for name in ("responses", "tokens", "rows", "threads")},
        **{name: getattr(asked, name) for name in ("skewed", "where")},
    }
    command = [sys.executable, __file__, "--model", ".", "--pairs", ".", "--case", json.dumps(case)]
    threads = {"OMP_NUM_THREADS": str(asked.threads)}
    environment = {**os.environ, **threads, "PYTHONPATH": str(tree.absolute())}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(case: dict[str, Any]) -> dict[str, Any]:
    """The second of two rollouts: seconds, tokens, the share of rows that were busy."""
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(case["threads"])
    dtype = getattr(torch, case["dtype"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(case["model"], dtype=dtype).eval().to(device)
    tokenizer = AutoTokenizer.from_pretrained(case["model"])
    prompts = read_prompts(case, tokenizer)
    limits = [case["tokens"]] * len(prompts)
    stops = (tokenizer.eos_token_id,)
    if case["skewed"]:
        lengths = np.random.default_rng(0).lognormal(0, SIGMA, len(prompts))
        scale = np.minimum(lengths / np.median(lengths), 10) * case["tokens"] / 10
        limits, stops = [max(1, int(length)) for length in scale], (-1,)
    steps: list[int] = []
    hook = model.base_model.register_forward_pre_hook(
        lambda _, __, given: (
            steps.append(given["input_ids"].shape[0]) if given["input_ids"].shape[1] == 1 else None
        ),
        with_kwargs=True,
    )
    run = way(case, model, prompts, limits, stops)
    run()
    steps.clear()
    wall, cpu = time.perf_counter(), time.process_time()
    responses = run()
    if device == "cuda":
        torch.cuda.synchronize()
    found = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    hook.remove()
    most = max(steps, default=1)
    found["tokens"] = sum(len(response.ids) for response in responses)
    found["busy"] = f"{sum(steps) / (most * max(1, len(steps))):.0%} of {most}"
    return {**found, "where": shares(run) if case["where"] else {}}


def way(case: dict[str, Any], model: Any, prompts: Any, limits: Any, stops: Any) -> Any:
    """How the tree that is imported samples: by its sampler, or by the loop it had before."""
    import torch

    from denserl_cli.core.engine.frozen import LocalModel

    keys = [(0, 1, row, 0) for row in range(len(prompts))]
    dtype = getattr(torch, case["dtype"])
    try:
        from denserl_cli.core.sampling.base import Sampling
        from denserl_cli.core.sampling.sampler import Sampler
        from denserl_cli.core.sampling.torch_engine import TorchSampling
    except ImportError:
        return padded(case, model, prompts, limits, stops, keys)
    engine = TorchSampling(LocalModel(model, dtype), rows=case["rows"], pad_id=0)
    sampling = Sampling(max(limits), stops)
    return lambda: Sampler(engine).sample(prompts, keys, sampling, limits=limits)


def padded(
    case: dict[str, Any], model: Any, prompts: Any, limits: Any, stops: Any, keys: Any
) -> Any:
    """Sampling as it was before there were samplers: padded batches, one after the other."""
    import numpy as np
    import torch
    from denserl_cli.core.ppo.sampling import Sampling, noise, sample

    from denserl_cli.core.data.batches import by_length
    from denserl_cli.core.models.device import autocast

    def run() -> list[Any]:
        found, uniform = [], noise(keys, max(limits))
        lengths = [len(prompt) for prompt in prompts]
        for part in by_length(lengths, np.arange(len(prompts)), case["rows"] or len(prompts)):
            with autocast(model.device, getattr(torch, case["dtype"])):
                some, most = [prompts[i] for i in part], [limits[i] for i in part]
                sampling = Sampling(max(limits), stops)
                found += sample(model, some, sampling, uniform[part], 0, limits=most)
        return found

    return run


def read_prompts(case: dict[str, Any], tokenizer: Any) -> list[Any]:
    """The first prompts of at most 256 tokens."""
    import numpy as np

    found = []
    with open(case["pairs"], encoding="utf-8") as lines:
        for line in lines:
            prompt = json.loads(line)["chosen"][:-1]
            ids = tokenizer.apply_chat_template(
                prompt, add_generation_prompt=True, return_dict=False
            )
            if len(ids) <= 256:
                found.append(np.array(ids, np.int32))
            if len(found) == case["responses"]:
                return found
    raise SystemExit(f"{case['pairs']} has fewer than {case['responses']} prompts")


def shares(run: Any) -> dict[str, float]:
    """Share of each kind of work in the time of a rollout, by torch's profiler."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        run()
    times = {one.key: one.self_cpu_time_total for one in profiled.key_averages()}
    total = sum(times.values())
    found = {
        kind: sum(t for name, t in times.items() if name.startswith(starts)) / total
        for kind, starts in KINDS.items()
    }
    return {**found, "the rest": 1 - sum(found.values())}


if __name__ == "__main__":
    main()
