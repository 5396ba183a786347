"""Log-probability and entropy: streamed, beside the full-logit way and the bare matrix products.

    python benchmarks/likelihood.py [--tokens 4096] [--vocabulary 128256] [--quick]

Forward and backward over random hidden states. The full-logit way is what everybody writes:
log_softmax, exp, sum, gather over all logits at once, in float32. The bare products are those that
nobody can do without (forward one; backward the same again, and one for each gradient), taken in
tiles of the streamed way's size with reused buffers. Times are medians of rounds in which the ways
take turns in one process, over fewer tokens. Memory is measured in a process for each case: the
highest resident set, above that of the inputs and, with a trained head, of its gradient. Prints a
Markdown table.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from denserl_cli.core import likelihood

ROOT = Path(__file__).resolve().parents[1]
WAYS = ("full", "streamed", "bare")
HEADS = ("trained", "frozen")


def main() -> None:
    """Measure every case and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=4096, help="for the memory")
    parser.add_argument("--timed-tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--vocabulary", type=int, default=128_256)
    parser.add_argument("--hidden", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--quick", action="store_true", help="small numbers, to see that it works")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        way, head, *shape = json.loads(arguments.case)
        print(peak(way, head, *shape))
        return
    if arguments.quick:
        arguments.tokens, arguments.timed_tokens, arguments.rounds = 512, 64, 2
        arguments.vocabulary, arguments.hidden = 32_064, [256]
    print("| hidden | weights | head | memory, MiB: full | streamed | full / streamed ", end="")
    print("| time: streamed / full | streamed / bare | forward alone / bare |")
    print("|---|---|---|---|---|---|---|---|---|")
    for hidden in arguments.hidden:
        for dtype in arguments.dtypes:
            for head in HEADS:
                print(row(hidden, dtype, head, arguments), flush=True)


def row(hidden: int, dtype: str, head: str, arguments: argparse.Namespace) -> str:
    """One line of the table."""
    shape = (arguments.tokens, hidden, arguments.vocabulary, dtype)
    full, streamed = (peak_of(way, head, *shape) for way in ("full", "streamed"))
    inputs = case(head, arguments.timed_tokens, hidden, arguments.vocabulary, dtype)
    names = (*WAYS, "streamed, forward", "bare, forward")
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(arguments.rounds + 1):
        for way in WAYS:
            times[way].append(seconds(lambda way=way: run(way, *inputs)))
        with torch.no_grad():
            for way in ("streamed", "bare"):
                times[f"{way}, forward"].append(seconds(lambda way=way: run(way, *inputs)))
    taken = {way: statistics.median(rounds[1:]) for way, rounds in times.items()}
    return (
        f"| {hidden} | {dtype} | {head} | {full:.0f} | {streamed:.0f} | {full / streamed:.0f} "
        f"| {taken['streamed'] / taken['full']:.2f} | {taken['streamed'] / taken['bare']:.2f} "
        f"| {taken['streamed, forward'] / taken['bare, forward']:.2f} |"
    )


def case(
    head: str, tokens: int, hidden: int, vocabulary: int, dtype: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, the head's weight and targets."""
    generator = torch.Generator().manual_seed(0)
    kind = getattr(torch, dtype)
    states = torch.randn(tokens, hidden, generator=generator).to(kind).requires_grad_()
    weight = (torch.randn(vocabulary, hidden, generator=generator) / hidden**0.5).to(kind)
    weight.requires_grad_(head == "trained")
    return states, weight, torch.randint(vocabulary, (tokens,), generator=generator)


def run(way: str, states: Tensor, weight: Tensor, targets: Tensor) -> None:
    """One pass, with the gradients where they are switched on."""
    states.grad = weight.grad = None
    if way == "bare":
        trained = weight.requires_grad
        bare_products(states.detach(), weight.detach(), torch.is_grad_enabled(), trained)
        return
    function = full_logits if way == "full" else likelihood.logprob_and_entropy
    logprob, entropy = function(states, weight, targets)
    if torch.is_grad_enabled():
        (logprob.sum() + 0.1 * entropy.sum()).backward()


def full_logits(states: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The plain way."""
    log_p = (states.float() @ weight.float().T).log_softmax(-1)
    return log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


def bare_products(states: Tensor, weight: Tensor, backward: bool, trained: bool) -> None:
    """The matrix products alone."""
    states, weight = states.float(), weight.float()
    tokens = min(likelihood.TILE_TOKENS, len(states))
    width = likelihood.TILE_BYTES // (4 * max(tokens, weight.shape[1]))
    buffer = torch.empty(tokens * width)
    grad_states = torch.zeros_like(states)
    grad_weight = torch.zeros_like(weight) if backward and trained else None
    for turn in range(1 + backward):
        for start in range(0, len(states), tokens):
            part = states[start : start + tokens]
            for first in range(0, len(weight), width):
                block = weight[first : first + width]
                logits = buffer[: len(part) * len(block)].view(len(part), len(block))
                torch.mm(part, block.T, out=logits)
                if turn:
                    grad_states[start : start + tokens].addmm_(logits, block)
                    if grad_weight is not None:
                        grad_weight[first : first + width].addmm_(logits.T, part)


def seconds(work: Callable[[], None]) -> float:
    """How long it takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def peak_of(way: str, head: str, *shape: object) -> float:
    """`peak` in a process of its own."""
    words = [str(Path(__file__)), "--case", json.dumps([way, head, *shape])]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
    }
    done = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, check=True, env=environment
    )
    return float(done.stdout)


def peak(way: str, head: str, *shape: Any) -> float:
    """The highest resident set of one pass beyond inputs and weight gradient, in MiB."""
    run(way, *case(head, 8, *shape[1:]))  # loads the libraries
    inputs = case(head, *shape)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget earlier peaks
    run(way, *inputs)
    gradient = inputs[1].grad
    own = 0 if gradient is None else gradient.nbytes
    return (resident("VmHWM") - before - own) / 2**20


def resident(name: str) -> int:
    """A line of this process's status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


if __name__ == "__main__":
    main()
