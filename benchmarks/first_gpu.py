"""The first ten minutes on a GPU: what nobody could know without one, in one table.

    python benchmarks/first_gpu.py [--out runs/first-gpu] [--only sampling likelihood ...] [--quick]

Every line stands beside what is expected of it on one H100 or H200, and where that comes from. What
a line needs and the machine lacks (DeepSpeed, FlashAttention, bitsandbytes) is said in it, and a
line that fails says why; the others go on. `--quick` runs everything in small sizes, on the CPU
too. Needs nothing but torch, transformers and this repository. Prints Markdown.
"""

from __future__ import annotations

import argparse
import gc
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
GIB = 2**30


class Sizes(NamedTuple):
    """How large everything is.

    decoder: width, feed-forward width, layers, heads, key heads and vocabulary of the policy that
    samples; reward: the same of the reward model. likelihood: N, V, H. matmul: side of the matrices
    whose product measures the device. pairs, length: of a step of reward-model training.
    """

    decoder: tuple[int, int, int, int, int, int]
    reward: tuple[int, int, int, int, int, int]
    likelihood: tuple[int, int, int]
    matmul: int
    rows: tuple[int, ...]
    prompt: int
    tokens: int
    pairs: int
    length: int
    steps: int
    sandbox: tuple[str, ...]


FULL = Sizes(
    decoder=(4096, 14336, 8, 32, 8, 128_256),
    reward=(2048, 8192, 16, 32, 8, 128_256),
    likelihood=(4096, 128_256, 4096),
    matmul=8192,
    rows=(4, 16, 64, 128),
    prompt=512,
    tokens=256,
    pairs=8,
    length=1024,
    steps=5,
    sandbox=("sandbox.pairs=400", "ppo.iterations=6"),
)
QUICK = Sizes(
    decoder=(64, 128, 2, 2, 2, 512),
    reward=(64, 128, 2, 2, 2, 512),
    likelihood=(64, 1000, 64),
    matmul=128,
    rows=(2, 4),
    prompt=8,
    tokens=8,
    pairs=2,
    length=32,
    steps=2,
    sandbox=(
        "sandbox.phrases=4",
        "sandbox.phrase_length=3",
        "sandbox.response_phrases=4",
        "sandbox.pairs=80",
        "sandbox.hidden_size=32",
        "sandbox.layers=1",
        "sandbox.fit_steps=150",
        "segmentation.cutoff=1.0",
        "data.eval_pairs=4",
        "data.eval_prompts=2",
        "reward_model.batch_size=8",
        "reward_model.micro_batch_size=8",
        "reward_model.epochs=1",
        "normalizer.pairs=40",
        "ppo.iterations=3",
        "ppo.rollout.batch_size=4",
        "ppo.train_batch_size=4",
        "ppo.micro_batch_size=4",
        "ppo.rollout.max_new_tokens=20",
    ),
)


class Line(NamedTuple):
    """What was measured, and what was expected."""

    what: str
    measured: str
    expected: str


class MissingError(Exception):
    """The machine lacks what a line needs."""


class Bench(NamedTuple):
    """The device, its type, the sizes, and a folder to work in."""

    device: torch.device
    dtype: torch.dtype
    sizes: Sizes
    out: Path


def main() -> None:
    """Measure every part and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/first-gpu"))
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it works")
    asked = parser.parse_args()
    cuda = torch.cuda.is_available()
    if not cuda and not asked.quick:
        raise SystemExit("there is no GPU; --quick runs on the CPU")
    bench = Bench(
        torch.device("cuda", 0) if cuda else torch.device("cpu"),
        torch.bfloat16 if cuda else torch.float32,
        QUICK if asked.quick else FULL,
        asked.out,
    )
    asked.out.mkdir(parents=True, exist_ok=True)
    for name in ("deepspeed", "datasets", "flash_attn", "peft", "bitsandbytes"):
        if find_spec(name) is None:
            print(f"{name} is not installed: what needs it is left out")
    print("\n| what | measured | expected |\n|---|---|---|", flush=True)
    began = time.perf_counter()
    for name in asked.only:
        for line in part(name, bench):
            print(f"| {' | '.join(line)} |", flush=True)
    print(f"\n{time.perf_counter() - began:.0f} s in all")


def part(name: str, bench: Bench) -> Iterator[Line]:
    """The lines of a part; the last one says why it could not go on."""
    try:
        yield from PARTS[name](bench)
    except MissingError as error:
        yield Line(name, f"left out: {error}", "")
    except Exception as error:  # whatever a device meets is a result
        text = " ".join(f"{type(error).__name__}: {error}".split())[:300].replace("|", "/")
        yield Line(name, f"**failed**: {text}", "")
    gc.collect()
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def versions(bench: Bench) -> Iterator[Line]:
    """What is installed, and what torch would choose."""
    import transformers

    cuda = bench.device.type == "cuda"
    name = torch.cuda.get_device_name() if cuda else "CPU"
    yield Line("device", name, "H100 or H200")
    yield Line("torch, transformers", f"{torch.__version__}, {transformers.__version__}", "")
    cudnn = torch.backends.cudnn.version() if cuda else None
    yield Line("cuDNN", str(cudnn), "above 91500 torch prefers its attention on sm_90")
    from denserl_cli.core.models.attention import attention_kernel
    from denserl_cli.core.recipe.schema import ModelConfig

    found = attention_kernel(ModelConfig(path=""))
    yield Line("model.attention=auto", found, "flash_attention_2 where it is installed, else sdpa")


def doctor(bench: Bench) -> Iterator[Line]:
    """What `denserl doctor` complains of."""
    from denserl_cli.core.doctor.checks import diagnose

    broken = diagnose([]).broken
    yield Line("denserl doctor", "; ".join(broken) or "nothing is broken", "nothing is broken")


def matmul_rate(bench: Bench) -> float:
    """Floating-point operations a second of one large product."""
    side = bench.sizes.matmul
    one = torch.randn(side, side, device=bench.device, dtype=bench.dtype)
    return 2 * side**3 / median_seconds(bench, lambda: one @ one)


def matmul(bench: Bench) -> Iterator[Line]:
    """The device's own speed."""
    rate = matmul_rate(bench)
    yield Line("bf16 product", f"{rate / 1e12:.1f} TFLOP/s", "600 to 800 of 989 on paper")


def likelihood(bench: Bench) -> Iterator[Line]:
    """The streamed likelihood: right, fast, and how much memory."""
    from denserl_cli.core.likelihood import logprob_and_entropy

    tokens, vocabulary, width = bench.sizes.likelihood
    torch.manual_seed(0)
    hidden = torch.randn(tokens, width, device=bench.device, dtype=bench.dtype)
    weight = torch.randn(vocabulary, width, device=bench.device, dtype=bench.dtype) / width**0.5
    targets = torch.randint(vocabulary, (tokens,), device=bench.device)
    few = slice(0, 32)
    got = logprob_and_entropy(hidden[few], weight, targets[few])[0]
    exact = logprob_and_entropy(
        hidden[few].cpu().double(), weight.cpu().double(), targets[few].cpu()
    )
    off = (got.cpu().double() - exact[0]).abs().max().item()
    yield Line("likelihood against float64 on the CPU", f"{off:.1e} nat", "below 1e-4")
    hidden.requires_grad_()
    weight.requires_grad_()

    def both() -> None:
        logprob, _ = logprob_and_entropy(hidden, weight, targets)
        logprob.sum().backward()

    reset_peak(bench)
    spent = median_seconds(bench, both)
    rate = 8 * tokens * vocabulary * width / spent  # forward, again, and one for each gradient
    share = f"{rate / matmul_rate(bench):.0%} of the product's rate"
    name = f"likelihood, N {tokens}, V {vocabulary}, H {width}, forward and backward"
    yield Line(name, f"{spent * 1e3:.1f} ms, {share}", "above 50 %")
    full = tokens * vocabulary * 4 / GIB
    yield Line("its peak above the inputs", peak(bench), f"all logits alone are {full:.2f} GiB")


def sandbox(bench: Bench) -> Iterator[Line]:
    """The three stages, each of them ended by Ctrl-C and resumed."""
    from denserl_cli.core.errors import Interrupted
    from denserl_cli.core.observer import Observer
    from denserl_cli.core.recipe import load_recipe
    from denserl_cli.core.stages.run import run_stage

    class CtrlC(Observer):
        """Presses it at the second thing that is done."""

        left = 2

        def metrics(self, step: int, metrics: Any) -> None:
            self.left -= 1
            if not self.left:
                os.kill(os.getpid(), signal.SIGINT)

    import shutil

    recipe, folder = (
        load_recipe("sandbox-segment", list(bench.sizes.sandbox)),
        bench.out / "sandbox",
    )
    shutil.rmtree(folder, ignore_errors=True)
    for stage in ("train-rm", "fit-function", "train-ppo"):
        began, stopped = time.perf_counter(), False
        try:
            run_stage(stage, recipe, folder, "start", CtrlC())  # type: ignore[arg-type]
        except Interrupted:
            stopped = True
            run_stage(stage, recipe, folder, "resume", Observer())  # type: ignore[arg-type]
        words = "interrupted and resumed" if stopped else "in one go"
        expected = "in one go" if stage == "fit-function" else "interrupted and resumed"
        yield Line(f"sandbox, {stage}", f"{words}, {time.perf_counter() - began:.0f} s", expected)


def forgotten(bench: Bench) -> Iterator[Line]:
    """A bad update under ZeRO 2 with Adam on the CPU leaves nothing behind."""
    need("deepspeed")
    from denserl_cli.core.engine.deepspeed_engine import DeepSpeedEngine

    model = reward_model(bench)
    engine = DeepSpeedEngine(model, **common(bench), engine=offloading(bench))
    rewards = reward_step(bench, engine)
    norms = []
    for bad in (False, True, False):
        loss = rewards()
        engine.backward(loss * torch.nan if bad else loss)
        try:
            engine.check()
            norms.append(f"{engine.norm.item():.3g}")
            engine.discard()  # so that all three are of the same weights
        except ArithmeticError as error:
            norms.append(str(error))
            engine.discard()
    yield Line(
        "ZeRO 2 with offload: gradient norm, a NaN loss, the same again",
        ", ".join(norms),
        "first and last are equal",
    )


def attention(bench: Bench) -> Iterator[Line]:
    """Sampling with each kernel of attention."""
    rows, model = min(16, bench.sizes.rows[-1]), decoder(bench)
    cuda = bench.device.type == "cuda"
    for on in (True, False) if cuda else (False,):
        torch.backends.cuda.enable_cudnn_sdp(on)
        first, rest = sampled(bench, model, rows), sampled(bench, model, rows)
        speed = f"{rest:.0f} tokens/s, the first time {first:.0f}"
        words = f"sampling {rows} rows, cuDNN attention {'on' if on else 'off'}"
        yield Line(words, speed, "on: 23 to 38 ms of host for each new shape the first time")
    torch.backends.cuda.enable_cudnn_sdp(cuda)
    need("flash_attn")
    model.set_attn_implementation("flash_attention_2")
    speed = f"{sampled(bench, model, rows):.0f} tokens/s"
    yield Line(f"sampling {rows} rows, FlashAttention 2", speed, "slower: it unpads each layer")


def rollout(bench: Bench) -> Iterator[Line]:
    """Sampled tokens a second by the number of rows."""
    model = decoder(bench)
    expected = {4: "102 without graphs, an 8B model, by arithmetic", 16: "294, the same"}
    for rows in bench.sizes.rows:
        sampled(bench, model, rows)
        reset_peak(bench)
        speed = sampled(bench, model, rows)
        words = expected.get(rows, "grows with the rows")
        yield Line(f"sampling {rows} rows", f"{speed:.0f} tokens/s, {peak(bench)}", words)


def training(bench: Bench) -> Iterator[Line]:
    """Reward-model training of a 1B model: speed, and memory beside the plan."""
    from denserl_cli.core.engine.torch_engine import TorchEngine

    ways: dict[str, Any] = {
        "plain torch": lambda model: TorchEngine(model, **common(bench)),
        "ZeRO 2, Adam on the CPU": lambda model: offloaded_engine(bench, model),
    }
    for name, make in ways.items():
        try:
            reset_peak(bench)
            yield from train(bench, name, make(reward_model(bench)))
        except MissingError as error:
            yield Line(f"train-rm, {name}", f"left out: {error}", "")
        gc.collect()


def train(bench: Bench, name: str, engine: Any) -> Iterator[Line]:
    """Some steps of an engine."""
    from denserl_cli.core.engine.base import step

    sizes, rewards = bench.sizes, reward_step(bench, engine)

    def work() -> None:
        engine.backward(rewards())
        step(engine)

    spent = median_seconds(bench, work, rounds=sizes.steps)
    tokens = 2 * sizes.pairs * sizes.length
    body = sum(p.numel() for p in engine.model.model.layers.parameters())
    width, _, layers, *_ = sizes.reward
    # 6 for each weight and token; attention, causal: 6 for each layer, width and token before it
    operations = tokens * (6 * body + 6 * layers * width * sizes.length)
    share = operations / spent / matmul_rate(bench)
    speed = f"{tokens / spent:.0f} tokens/s, {share:.0%} of the product's rate"
    yield Line(f"train-rm, {body / 1e9:.2f}B in layers, {name}", speed, "no peer has published it")
    planned = planned_bytes(bench, name) / GIB
    yield Line(f"its peak, {name}", peak(bench), f"denserl plan: {planned:.2f} GiB")


def quantized(bench: Bench) -> Iterator[Line]:
    """Five steps of QLoRA."""
    need("peft")
    need("bitsandbytes")
    if bench.device.type != "cuda":
        raise MissingError("4-bit weights need CUDA")
    from denserl_cli.core.engine.base import step
    from denserl_cli.core.engine.torch_engine import TorchEngine
    from denserl_cli.core.models.lora import load_reference, new_scalar_model
    from denserl_cli.core.recipe import load_recipe

    folder = bench.out / "start"
    causal_lm(bench, bench.sizes.reward).save_pretrained(folder)
    words = [f"model.path={folder}", "sandbox=null", "lora={rank: 16, quantize: true}"]
    recipe = load_recipe("sandbox-segment", words)
    engine = TorchEngine(new_scalar_model(recipe, load_reference(recipe)), **common(bench))
    rewards, losses = reward_step(bench, engine), []
    for _ in range(5):
        loss = rewards()
        losses.append(f"{loss.item():.3f}")
        engine.backward(loss)
        step(engine)
    yield Line("QLoRA, losses of five steps on one batch", ", ".join(losses), "they fall")
    yield Line("its peak", peak(bench), "")


PARTS: dict[str, Callable[[Bench], Iterator[Line]]] = {
    "versions": versions,
    "doctor": doctor,
    "matmul": matmul,
    "likelihood": likelihood,
    "sandbox": sandbox,
    "forgotten": forgotten,
    "attention": attention,
    "rollout": rollout,
    "training": training,
    "quantized": quantized,
}


def need(library: str) -> None:
    """Raise MissingError where a library is not installed."""
    if find_spec(library) is None:
        raise MissingError(f"{library} is not installed")


def config(shape: tuple[int, ...]) -> Any:
    """A Llama of a shape."""
    from transformers import LlamaConfig

    hidden, inner, layers, heads, pairs, vocabulary = shape
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=pairs,
        vocab_size=vocabulary,
        max_position_embeddings=8192,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
        tie_word_embeddings=False,
    )


def causal_lm(bench: Bench, shape: tuple[int, ...]) -> Any:
    """A language model of random weights, frozen, in the compute type."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    with bench.device:
        model = LlamaForCausalLM(config(shape)).to(bench.dtype)
    return model.eval().requires_grad_(False)


def decoder(bench: Bench) -> Any:
    """The policy that samples."""
    from denserl_cli.core.models.causal_lm import StreamedHead

    model = causal_lm(bench, bench.sizes.decoder)
    StreamedHead.take_over(model)
    return model


def sampled(bench: Bench, model: Any, rows: int) -> float:
    """Tokens a second of so many rows, none of which ends before the last token."""
    from denserl_cli.core.engine.frozen import LocalModel
    from denserl_cli.core.sampling.base import Request, Sampling
    from denserl_cli.core.sampling.torch_engine import TorchSampling

    sizes, rng = bench.sizes, np.random.default_rng(0)
    prompts = rng.integers(3, sizes.decoder[-1], (rows, sizes.prompt)).astype(np.int32)
    requests = [Request(ids, (0, row), sizes.tokens) for row, ids in enumerate(prompts)]
    engine = TorchSampling(LocalModel(model, bench.dtype), rows=rows, pad_id=0)
    began = time.perf_counter()
    engine.sample(requests, Sampling(sizes.tokens, stop_ids=()), lambda _: None)
    synchronize(bench)
    return rows * sizes.tokens / (time.perf_counter() - began)


def reward_model(bench: Bench) -> Any:
    """A reward model of random float32 weights, to be trained with gradient checkpointing."""
    from transformers import LlamaForSequenceClassification

    from denserl_cli.core.models.scalar_head import ScalarHead
    from denserl_cli.core.models.weights import checkpoint_activations
    from denserl_cli.core.recipe.schema import ModelConfig

    settings = config(bench.sizes.reward)
    settings.num_labels = 1
    torch.manual_seed(0)
    with bench.device:
        model = LlamaForSequenceClassification(settings)
    ScalarHead.take_over(model)
    checkpoint_activations(model, ModelConfig(path="", gradient_checkpointing=True))
    return model.train()


def reward_step(bench: Bench, engine: Any) -> Callable[[], torch.Tensor]:
    """The loss of one batch of pairs, the same each time."""
    from denserl_cli.core.data.batches import collate_sequences
    from denserl_cli.core.models.scalar_head import token_values
    from denserl_cli.core.reward_model.loss import preference_loss

    sizes, rng = bench.sizes, np.random.default_rng(0)
    ids = rng.integers(3, sizes.reward[-1], (2 * sizes.pairs, sizes.length)).astype(np.int32)
    half = sizes.length // 2
    batch = collate_sequences(list(ids[:, :half]), list(ids[:, half:]), 0, bench.device)

    def loss() -> torch.Tensor:
        chosen, rejected = engine(token_values, batch)[:, -1].chunk(2)
        return preference_loss(chosen, rejected)

    return loss


def common(bench: Bench) -> dict[str, Any]:
    """What every engine is made with."""
    from denserl_cli.core.recipe.schema import OptimizerConfig

    return {
        "learning_rate": 1e-5,
        "settings": OptimizerConfig(),
        "total_steps": 100,
        "compute_dtype": bench.dtype,
    }


def offloading(bench: Bench) -> Any:
    """ZeRO 2 with Adam on the CPU; without a GPU that must be forced."""
    from denserl_cli.core.recipe.schema import EngineConfig

    if bench.device.type == "cuda":
        return EngineConfig(kind="deepspeed", zero_stage=2, offload_optimizer=True)
    to_cpu = {"offload_optimizer": {"device": "cpu", "pin_memory": False}}
    return EngineConfig(kind="deepspeed", zero_stage=2, deepspeed={"zero_optimization": to_cpu})


def offloaded_engine(bench: Bench, model: Any) -> Any:
    """The engine that trains a model so."""
    need("deepspeed")
    from denserl_cli.core.engine.deepspeed_engine import DeepSpeedEngine

    return DeepSpeedEngine(model.to(bench.dtype), **common(bench), engine=offloading(bench))


def planned_bytes(bench: Bench, name: str) -> float:
    """What the plan says of the peak, without its allowance."""
    from denserl_cli.core.planning import memory_terms as memory
    from denserl_cli.core.planning import stage_memory
    from denserl_cli.core.planning.model_shape import config_shape
    from denserl_cli.core.recipe import load_recipe

    sizes = bench.sizes
    words = [
        "segmentation={granularity: bandit, cutoff: null}",
        f"data.max_prompt_length={sizes.length // 2}",
        f"reward_model.micro_batch_size={sizes.pairs}",
        f"data.max_length={sizes.length}",
    ]
    offload = name != "plain torch"
    setting = memory.Setting(
        zero_stage=2 if offload else 0,
        offload_optimizer=offload,
        compute=2 if bench.dtype is torch.bfloat16 else 4,
    )
    recipe = load_recipe("sandbox-segment", words)
    plan = stage_memory.plan(recipe, config_shape(config(sizes.reward)), "train-rm", setting)
    return plan.peak - memory.CUDA_ALLOWANCE


def median_seconds(bench: Bench, work: Callable[[], object], rounds: int = 5) -> float:
    """How long it takes, the device's work included; the first time is left out."""
    times = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        work()
        synchronize(bench)
        times.append(time.perf_counter() - began)
    return float(np.median(times[1:]))


def synchronize(bench: Bench) -> None:
    """Wait for the device."""
    if bench.device.type == "cuda":
        torch.cuda.synchronize()


def reset_peak(bench: Bench) -> None:
    """Begin to measure the peak anew."""
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peak(bench: Bench) -> str:
    """The most that tensors held on the GPU since."""
    if bench.device.type != "cuda":
        return "not measured on a CPU"
    return f"{torch.cuda.max_memory_allocated() / GIB:.2f} GiB"


if __name__ == "__main__":
    main()
