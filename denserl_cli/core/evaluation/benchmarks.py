"""The benchmarks for reward models that are known, by name."""

from __future__ import annotations

from denserl_cli.core.evaluation import judge_bench, reward_bench, reward_bench_2, rm_bench
from denserl_cli.core.evaluation.benchmark_rows import BenchmarkFormat, RankedBenchmark

RANKED: dict[str, RankedBenchmark] = {
    one.format.name: one
    for one in (reward_bench_2.BENCHMARK, rm_bench.BENCHMARK, judge_bench.BENCHMARK)
}
"""Those with metrics of their own."""
FORMATS: dict[str, BenchmarkFormat] = {
    one.name: one for one in (reward_bench.FORMAT, *(ranked.format for ranked in RANKED.values()))
}
"""What every benchmark's rows look like, RewardBench's among them, which are preference pairs."""
