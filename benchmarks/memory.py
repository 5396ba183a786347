"""How far `denserl plan` is off: predicted against measured peaks, on CPU processes.

    python benchmarks/memory.py [--shapes small medium wide] [--engines torch-float32 ...]

Every case is one to four processes, each of which builds small random models and takes two steps of
a stage with two micro-batches each. Measured is the highest resident set of the first process after
loading, above what it had before there was a model; malloc gives large blocks back at once, so
that this is what tensors hold. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
SHAPES = {
    "small": (256, 688, 4, 4, 2, 4_000),
    "medium": (512, 1376, 6, 8, 8, 8_000),
    "wide": (768, 2048, 5, 12, 12, 12_000),
}
"""Width, feed-forward width, layers, heads, key heads, vocabulary."""


class How(NamedTuple):
    """How a case trains; zero_stage 0 is plain torch. sharded: the frozen models as well.

    offload: of the optimizer, into what is the same memory for CPU processes. gradient: the type in
    which gradients are accumulated.
    """

    zero_stage: int
    processes: int
    dtype: str
    sharded: bool = False
    lora: bool = False
    offload: bool = False
    gradient: str = "float32"


ENGINES = {
    "torch-float32": How(0, 1, "float32"),
    "torch-bfloat16": How(0, 1, "bfloat16"),
    "torch-lora-float32": How(0, 1, "float32", lora=True),
    "zero1-float32-2": How(1, 2, "float32"),
    "zero1-bfloat16-2": How(1, 2, "bfloat16"),
    "zero2-float32": How(2, 1, "float32"),
    "zero2-float32-2": How(2, 2, "float32"),
    "zero2-bfloat16-2": How(2, 2, "bfloat16"),
    "zero2-lora-float32-2": How(2, 2, "float32", lora=True),
    "zero3-float32": How(3, 1, "float32"),
    "zero3-float32-2": How(3, 2, "float32"),
    "zero3-bfloat16-2": How(3, 2, "bfloat16"),
    "zero3-sharded-float32-2": How(3, 2, "float32", sharded=True),
    "zero2-offload-float32-2": How(2, 2, "float32", offload=True),
    "zero2-offload-bfloat16-2": How(2, 2, "bfloat16", offload=True),
    "zero2-offload-bfloat16-4": How(2, 4, "bfloat16", offload=True),
    "zero2-offload-narrow-2": How(2, 2, "bfloat16", offload=True, gradient="bfloat16"),
    "zero3-offload-float32-2": How(3, 2, "float32", offload=True),
    "zero3-offload-bfloat16-2": How(3, 2, "bfloat16", offload=True),
    "zero3-offload-bfloat16-4": How(3, 4, "bfloat16", offload=True),
}
STAGES = ("train-rm", "train-ppo")
PROMPT, RESPONSE = 96, 64
RANK = 16


def main() -> None:
    """Run every case and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=STAGES)
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=ENGINES)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--case", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        stage, engine, shape = arguments.case
        work(stage, engine, shape, arguments.checkpointing)
        return
    print("| stage | engine | shape | weights, M | predicted, MiB | measured, MiB | ratio |")
    print("|---|---|---|---|---|---|---|")
    for stage in arguments.stages:
        for engine in arguments.engines:
            for shape in arguments.shapes:
                print(row(stage, engine, shape, arguments.checkpointing), flush=True)


def row(stage: str, engine: str, shape: str, checkpointing: bool) -> str:
    """Run one case in processes of its own; its line of the table."""
    words = [str(Path(__file__)), "--case", stage, engine, shape]
    words += ["--checkpointing"] if checkpointing else []
    count = ENGINES[engine].processes
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
        "MALLOC_ARENA_MAX": "1",
    }
    done = subprocess.run(
        [sys.executable, *launcher, *words], capture_output=True, text=True, env=environment
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        raise SystemExit(f"{stage} {engine} {shape} failed:\n{done.stderr[-3000:]}")
    found = json.loads(lines[-1])
    predicted, measured = found["predicted"] / 2**20, found["measured"] / 2**20
    figures = f"{found['weights'] / 1e6:.1f} | {predicted:.0f} | {measured:.0f}"
    return f"| {stage} | {engine} | {shape} | {figures} | {predicted / measured:.2f} |"


def work(stage: str, engine: str, shape: str, checkpointing: bool) -> None:
    """Train for two steps in this process; the first process prints what it found."""
    from denserl_cli.core.system import distributed

    distributed.join()
    train(stage, engine, "small", steps=1, checkpointing=False)  # loads every library
    before = resident("VmRSS")
    peak = train(stage, engine, shape, steps=2, checkpointing=checkpointing)
    if distributed.is_main_process():
        found = {"measured": peak - before, **predict(stage, engine, shape, checkpointing)}
        print(json.dumps(found))
    distributed.leave()


def predict(stage: Any, engine: str, shape: str, checkpointing: bool) -> dict[str, float]:
    """What the plan says of the case."""
    from denserl_cli.core.likelihood import TILE_BYTES
    from denserl_cli.core.planning import feasibility as planning
    from denserl_cli.core.planning import memory_terms as memory
    from denserl_cli.core.planning import stage_memory as phases
    from denserl_cli.core.planning.model_shape import config_shape
    from denserl_cli.core.recipe import load_recipe

    how = ENGINES[engine]
    recipe = load_recipe("sandbox-segment", settings(how))
    setting = replace(
        planning.recipe_setting(recipe, stage, how.processes),
        zero_stage=how.zero_stage,
        compute=4 if how.dtype == "float32" else 2,
        gradient=4 if how.gradient == "float32" else 2,
        offload_optimizer=how.offload,
        checkpointing=checkpointing,
        tile=TILE_BYTES,
        on_cpu=True,
        shard_frozen=how.sharded,
    )
    found = config_shape(config(shape))
    plan = phases.plan(recipe, found, stage, setting)
    peaks = {name: memory.total(terms) for name, terms in plan.phases.items() if name != "load"}
    top = max(peaks, key=lambda name: peaks[name])
    offloaded = plan.cpu / how.processes if how.offload else 0
    return {"predicted": peaks[top] + offloaded, "weights": found.parameters}


def settings(how: How) -> list[str]:
    """The recipe of a case."""
    lora = [f"lora={{rank: {RANK}}}"] if how.lora else []
    return [
        *lora,
        *(
            f"data.max_length={PROMPT + RESPONSE}",
            f"data.max_prompt_length={PROMPT}",
            "reward_model.micro_batch_size=2",
            "ppo.rollout.batch_size=8",
            "ppo.rollout.samples_per_prompt=1",
            "ppo.train_batch_size=8",
            "ppo.micro_batch_size=4",
            "ppo.rollout.micro_batch_size=4",
            f"ppo.max_prompt_length={PROMPT}",
            f"ppo.rollout.max_new_tokens={RESPONSE}",
        ),
    ]


def config(shape: str) -> Any:
    """The shape as a configuration of transformers."""
    from transformers import LlamaConfig

    hidden, inner, layers, heads, pairs, vocabulary = SHAPES[shape]
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=pairs,
        vocab_size=vocabulary,
        max_position_embeddings=1024,
        pad_token_id=0,
        tie_word_embeddings=False,
    )


def tiny_model(shape: str, dtype: str) -> Callable[..., Any]:
    """Makes models of a shape with random weights."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    from denserl_cli.core.models.causal_lm import StreamedHead
    from denserl_cli.core.models.scalar_head import ScalarHead

    def make(*, scalar: bool = False, trained: bool = True, checkpointing: bool = False) -> Any:
        kind: Any = AutoModelForSequenceClassification if scalar else AutoModelForCausalLM
        settings = config(shape)
        settings.num_labels = 1
        model = kind.from_config(settings)
        (ScalarHead if scalar else StreamedHead).take_over(model)
        model.requires_grad_(trained).train(trained)
        if trained and checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if not trained and scalar:
            model.model.to(getattr(torch, dtype))
        elif not trained:
            model.to(getattr(torch, dtype))
        return model

    return make


def train(stage: str, engine: str, shape: str, *, steps: int, checkpointing: bool) -> int:
    """Some steps of a stage; the peak of the resident set after everything was built."""
    make = tiny_model(shape, ENGINES[engine].dtype)
    rng = np.random.default_rng(0)
    vocabulary = SHAPES[shape][-1]

    def rows(count: int, length: int) -> list[np.ndarray]:
        return list(rng.integers(1, vocabulary, (count, length)))

    take_step = (reward_steps if stage == "train-rm" else ppo_steps)(make, engine, checkpointing)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the high-water mark starts anew
    for _ in range(steps):
        take_step(rows)
    return resident("VmHWM")


def make_engine(model: Any, engine: str) -> Any:
    """The engine of a case around a model."""
    import torch

    from denserl_cli.core.engine.torch_engine import TorchEngine
    from denserl_cli.core.recipe.schema import EngineConfig, OptimizerConfig

    zero, dtype = ENGINES[engine].zero_stage, ENGINES[engine].dtype
    common: dict[str, Any] = {
        "learning_rate": 1e-4,
        "settings": OptimizerConfig(),
        "total_steps": 8,
        "compute_dtype": getattr(torch, dtype),
    }
    if zero == 0:
        return TorchEngine(model, **common)
    from denserl_cli.core.engine.deepspeed_engine import DeepSpeedEngine

    settings = EngineConfig(zero_stage=zero, gradient_dtype=ENGINES[engine].gradient)  # type: ignore[arg-type]
    if ENGINES[engine].offload:
        to_cpu = {"device": "cpu", "pin_memory": False}
        settings = replace(settings, deepspeed={"zero_optimization": {"offload_optimizer": to_cpu}})
    return DeepSpeedEngine(model, engine=settings, **common)


def learnt(engine: str, reference: Any, *, scalar: bool = True) -> Any:
    """A model of adapters over the reference's weights, where the case trains such."""
    from denserl_cli.core.models.lora import new_policy, new_scalar_model
    from denserl_cli.core.recipe import load_recipe

    how = ENGINES[engine]
    if not how.lora:
        return None
    recipe = load_recipe("sandbox-segment", settings(how))
    return (new_scalar_model if scalar else new_policy)(recipe, reference)


def frozen(model: Any, engine: str) -> Any:
    """A model that is not trained, spread over the processes where the case does."""
    import torch

    from denserl_cli.core.engine.frozen import LocalModel, ShardedModel
    from denserl_cli.core.recipe.schema import EngineConfig

    dtype = getattr(torch, ENGINES[engine].dtype)
    if ENGINES[engine].sharded:
        return ShardedModel(model, EngineConfig(), dtype)
    return LocalModel(model, dtype)


def reward_steps(make: Any, engine: str, checkpointing: bool) -> Callable[[Any], None]:
    """Steps of train-rm: the reference segments, the reward model learns."""
    from denserl_cli.core.data.batches import collate_sequences
    from denserl_cli.core.engine.base import step as engine_step
    from denserl_cli.core.models.scalar_head import token_values
    from denserl_cli.core.recipe.resolved import ResolvedSegmentation
    from denserl_cli.core.reward_model import aggregate_segments, preference_loss
    from denserl_cli.core.scoring.scorer import Scorer

    reference = make(trained=False).eval()
    model = learnt(engine, reference) or make(scalar=True, checkpointing=checkpointing)
    learner = make_engine(model, engine)
    scorer = Scorer(ResolvedSegmentation(cutoff=1.0), reference=frozen(reference, engine))

    def step(rows: Any) -> None:
        for last in (False, True):
            batch = collate_sequences(rows(4, PROMPT), rows(4, RESPONSE), 0)
            ends = scorer(batch).ends
            values = learner(token_values, batch)
            chosen, rejected = aggregate_segments(values, ends).chunk(2)
            learner.backward(preference_loss(chosen, rejected) / 2, last=last)
        engine_step(learner)

    return step


def ppo_steps(make: Any, engine: str, checkpointing: bool) -> Callable[[Any], None]:
    """Iterations of train-ppo: sample, score with all four models, learn."""
    import torch

    from denserl_cli.core.data.batches import collate_sequences
    from denserl_cli.core.engine.base import step as engine_step
    from denserl_cli.core.models.causal_lm import response_logprobs
    from denserl_cli.core.models.scalar_head import token_values
    from denserl_cli.core.ppo.losses import clipped_policy_loss, clipped_value_loss
    from denserl_cli.core.recipe.resolved import ResolvedSegmentation
    from denserl_cli.core.sampling.base import Sampling
    from denserl_cli.core.sampling.sampler import Sampler
    from denserl_cli.core.sampling.torch_engine import TorchSampling
    from denserl_cli.core.scoring.scorer import Scorer

    reference = make(trained=False).eval()
    adapted = learnt(engine, reference)  # a reward model of adapters shares its weights
    scorer = Scorer(
        ResolvedSegmentation(cutoff=1.0),
        reference=frozen(reference, engine),
        reward_model=frozen(adapted or make(scalar=True, trained=False).eval(), engine),
    )
    policy = learnt(engine, reference, scalar=False) or make(checkpointing=checkpointing)
    values = learnt(engine, reference) or make(scalar=True, checkpointing=checkpointing)
    actor, critic = make_engine(policy, engine), make_engine(values, engine)
    sampler = Sampler(TorchSampling(actor, rows=4, pad_id=0))

    def roll_out(prompts: list[np.ndarray]) -> list[np.ndarray]:
        keys = [[0, row] for row in range(len(prompts))]
        drawn = sampler.sample(prompts, keys, Sampling(RESPONSE, ()))
        return [response.ids for response in drawn]

    def step(rows: Any) -> None:
        prompts = rows(4, PROMPT)
        batch = collate_sequences(prompts, roll_out(prompts), 0)
        with torch.no_grad():
            scorer(batch)
            old = actor(response_logprobs, batch, with_entropy=False).logprobs.float()
            values = critic(token_values, batch, before=True).float()
        mask = batch.response_mask
        for last in (False, True):
            found = critic(token_values, batch, before=True)
            loss = clipped_value_loss(found, values, values + 1, mask, clip=0.2).loss
            critic.backward(loss / 2, last=last)
            logprobs = actor(response_logprobs, batch, with_entropy=False).logprobs
            loss = clipped_policy_loss(logprobs, old, values + 1, mask, clip=0.2).loss
            actor.backward(loss / 2, last=last)
        engine_step(critic, actor)

    return step


def resident(field: str) -> int:
    """Bytes of this process's resident set: VmRSS now, VmHWM at its highest."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("this benchmark reads /proc, which Linux alone has")


if __name__ == "__main__":
    main()
