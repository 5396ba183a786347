"""Rollout engines: denserl's sampling beside transformers' `generate` and its continuous batching.

    python benchmarks/rollout.py [--responses 64] [--tokens 256] [--rounds 3] [--quick]

A Llama of random weights writes responses of skewed lengths (log-normal, median 30; each ends at a
length of its own, so that all engines write the same number of tokens) to prompts of 10 to 100
tokens, on CUDA (bfloat16, SDPA) where there is one. `generate` has no length for each row: it cuts
every row at the longest, and what it writes beyond does not count. Continuous batching starts its
manager anew for each batch, as a rollout engine would whose weights change between iterations.
Prints response tokens a second, medians of rounds in turns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from denserl_cli.core.ppo.sampling import Sampling, noise, sample
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    ContinuousBatchingConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

VOCABULARY, MEDIAN, SIGMA = 32_064, 30, 0.9


def main() -> None:
    """Measure in turns and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--responses", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="small numbers, to see that it works")
    asked = parser.parse_args()
    if asked.quick:
        asked.responses, asked.tokens, asked.rounds, asked.hidden, asked.layers = 8, 32, 1, 32, 2
    engines = Engines(asked)
    ways = {
        "denserl": engines.denserl,
        "transformers, generate": engines.generate,
        "transformers, continuous batching": engines.continuous,
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(asked.rounds + 1):
        for name, way in ways.items():
            times[name].append(way())
    taken = {name: statistics.median(rounds[1:]) for name, rounds in times.items()}
    tokens = sum(engines.limits)
    print(f"{asked.responses} responses, {tokens} tokens, the longest {max(engines.limits)}\n")
    print("| | tokens a second | times generate |\n|---|---|---|")
    for name, seconds in taken.items():
        ratio = taken["transformers, generate"] / seconds
        print(f"| {name} | {tokens / seconds:.0f} | {ratio:.2f} |")


class Engines:
    """The same work, each engine's way; every method returns its seconds."""

    def __init__(self, asked: argparse.Namespace) -> None:
        torch.manual_seed(0)
        rng = np.random.default_rng(0)
        cuda = torch.cuda.is_available()
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=asked.hidden,
            intermediate_size=4 * asked.hidden,
            num_hidden_layers=asked.layers,
            num_attention_heads=max(1, asked.hidden // 64),
            num_key_value_heads=max(1, asked.hidden // 64),
            eos_token_id=None,
            pad_token_id=0,
        )
        self.model = LlamaForCausalLM(config).eval()
        self.model.to(*(("cuda", torch.bfloat16) if cuda else ("cpu",)))
        lengths = rng.lognormal(np.log(MEDIAN), SIGMA, asked.responses)
        self.limits = [int(length) for length in lengths.clip(1, asked.tokens)]
        self.prompts = [
            rng.integers(3, VOCABULARY, rng.integers(10, 100)).astype(np.int32) for _ in self.limits
        ]
        self.uniform = noise([(0, row) for row in range(asked.responses)], max(self.limits))

    def denserl(self) -> float:
        """Rows that have ended leave the batch."""
        sampling = Sampling(max_new_tokens=max(self.limits), stop_ids=())
        return seconds(
            lambda: sample(self.model, self.prompts, sampling, self.uniform, 0, limits=self.limits)
        )

    @torch.no_grad()
    def generate(self) -> float:
        """All rows go on to the longest."""
        rows = [torch.from_numpy(prompt).long() for prompt in self.prompts]
        ids = pad_sequence(rows, batch_first=True, padding_side="left").to(self.model.device)
        mask = (ids != 0).long()
        settings = self._settings(max(self.limits))
        return seconds(
            lambda: self.model.generate(ids, attention_mask=mask, generation_config=settings)
        )

    @torch.no_grad()
    def continuous(self) -> float:
        """Requests of a paged cache; the manager's start counts, as a rollout would pay it."""
        page = 32
        longest = max(map(len, self.prompts)) + max(self.limits)
        config = ContinuousBatchingConfig(
            page_size=page,
            num_blocks=len(self.prompts) * (longest // page + 2),
            max_batch_tokens=max(2048, len(self.prompts)),
        )

        def run() -> None:
            manager = self.model.continuous_batching_context_manager(
                generation_config=self._settings(max(self.limits)),
                continuous_batching_config=config,
                warmup=False,
            )
            with manager as running:
                for prompt, limit in zip(self.prompts, self.limits, strict=True):
                    running.add_request(prompt.tolist(), max_new_tokens=limit, eos_token_id=-1)
                written = 0
                while written < sum(self.limits):
                    result = running.get_result(timeout=1)
                    if result is None and not running.is_running():
                        raise SystemExit("continuous batching ended early")
                    if result is not None and result.is_finished():
                        if result.error:
                            raise SystemExit(f"continuous batching failed: {result.error}")
                        written += len(result.generated_tokens)

        return seconds(run)

    def _settings(self, tokens: int) -> GenerationConfig:
        return GenerationConfig(
            do_sample=True, top_k=0, max_new_tokens=tokens, eos_token_id=None, pad_token_id=0
        )


def seconds(work: Callable[[], object]) -> float:
    """How long it takes, the device's work included."""
    began = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
