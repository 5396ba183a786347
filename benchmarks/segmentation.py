"""Segmentation and reward spreading of one batch, beside loops over tokens and a forward pass.

    python benchmarks/segmentation.py [--rows 64] [--tokens 1024] [--rounds 7] [--quick]

The loops do what the vectorised functions do, and their results are compared: over a Python list
that was transferred once, and over a tensor that is asked for each element. The forward pass is the
reward model's on the same batch (hidden 256, 4 layers, no head). The ways take turns; medians.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from denserl_cli.core.ppo.rewards import spread_rewards
from denserl_cli.core.segmentation import segment_ends

CUTOFF = 1.0


def main() -> None:
    """Measure in turns and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="small numbers, to see that it works")
    asked = parser.parse_args()
    if asked.quick:
        asked.rows, asked.tokens, asked.rounds = 8, 128, 2
    torch.manual_seed(0)
    entropy = 2 * torch.rand(asked.rows, asked.tokens)
    values = torch.randn(asked.rows, asked.tokens)
    lengths = torch.randint(asked.tokens // 4, asked.tokens + 1, (asked.rows, 1))
    mask = torch.arange(asked.tokens) < lengths
    ways: dict[str, Callable[[], Any]] = {
        "denserl": lambda: vectorised(entropy, values, mask),
        "loop over a list": lambda: looped(entropy.tolist(), values.tolist(), mask.tolist()),
        "loop over the tensor": lambda: looped(entropy, values, mask),
        "forward pass": forward(mask),
    }
    for name in ("loop over a list", "loop over the tensor"):
        torch.testing.assert_close(torch.tensor(ways[name]()), ways["denserl"]())
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(asked.rounds + 1):
        for name, way in ways.items():
            if name == "loop over the tensor" and turn > 2:
                continue  # slow, and steady
            began = time.perf_counter()
            way()
            times[name].append(time.perf_counter() - began)
    taken = {name: statistics.median(rounds[1:]) for name, rounds in times.items()}
    print("| | milliseconds | times denserl |\n|---|---|---|")
    for name, seconds in taken.items():
        print(f"| {name} | {1e3 * seconds:.2f} | {seconds / taken['denserl']:.0f} |")
    print(f"\n{100 * taken['denserl'] / taken['forward pass']:.3f} % of the forward pass")


def vectorised(entropy: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Segment ends and rewards for each token, as train-ppo has them."""
    ends = segment_ends(entropy, mask, granularity="segment", cutoff=CUTOFF)
    return spread_rewards(values, ends, mask, segment_total="mean")


def looped(entropy: Any, values: Any, mask: Any) -> list[list[float]]:
    """The same, token by token."""
    rewards = []
    for row in range(len(mask)):
        length = 0
        for column in range(len(mask[row])):
            if mask[row][column]:
                length = column + 1
        last = max(length - 2, 0)  # the terminator belongs to no segment
        ends = [column for column in range(last) if entropy[row][column] > CUTOFF] + [last]
        found, start = [0.0] * len(mask[row]), 0
        for end in ends:
            reward = float(values[row][end]) / len(ends) / (end - start + 1)
            for column in range(start, end + 1):
                found[column] = max(-10.0, min(10.0, reward))
            start = end + 1
        rewards.append(found)
    return rewards


@torch.no_grad()
def forward(mask: Tensor) -> Callable[[], Any]:
    """The pass of a small reward model over the batch."""
    from transformers import LlamaConfig, LlamaModel

    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    model = LlamaModel(LlamaConfig(vocab_size=32_064, **sizes, **heads)).eval()
    ids = torch.randint(32_064, mask.shape)
    return torch.no_grad()(lambda: model(input_ids=ids, attention_mask=mask, use_cache=False))


if __name__ == "__main__":
    main()
