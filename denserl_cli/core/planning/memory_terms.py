"""What a model costs in memory: one function a term, bytes on one GPU unless it says otherwise.

P: weights of a model, T those that are trained, N GPUs, w bytes of the compute type, g of the
accumulated gradients, H width, L layers. `benchmarks/memory.py` compares the sums with what
processes really used.
"""

from __future__ import annotations

from dataclasses import dataclass

from denserl_cli.core.planning.model_shape import ModelShape

GIB = 2**30
CUDA_ALLOWANCE = 2 * GIB
"""Context, library workspaces and fragmentation on a GPU: an allowance, not a measurement."""
SUB_GROUP = 1_000_000_000
"""Weights that ZeRO 3 updates together: DeepSpeed's default."""
FLOAT = 4

Bytes = dict[str, float]
"""Bytes by term; absent terms are 0."""
TERMS = (
    "weights",
    "optimizer",
    "gradients",
    "frozen models",
    "bfloat16 copies",
    "gathered weights",
    "communication",
    "activations",
    "likelihood",
    "KV cache",
    "rollout",
    "CUDA allowance",
)


@dataclass(frozen=True)
class Setting:
    """How a stage is spread over GPUs.

    Attributes:
        gpus: GPUs that there are.
        zero_stage: ZeRO stage; 0 is plain torch in one process.
        offload_optimizer: Whether Adam's state and the master weights are on the CPU.
        offload_parameters: Whether the sharded weights are on the CPU.
        shard_frozen: Whether the frozen models are sharded.
        offload_frozen: Whether the frozen models are on the CPU while they do not score.
        compute: Bytes of the compute type.
        gradient: Bytes of an accumulated gradient.
        checkpointing: Whether layers are computed again for the backward pass.
        eager: Whether attention weights are made whole.
        bucket: Weights whose gradients are reduced together.
        live: Weights that ZeRO 3 keeps gathered.
        prefetch: Weights that ZeRO 3 fetches together.
        tile: Bytes of one tile of logits.
        on_cpu: CPU processes, which hold what they touch of a buffer and need no allowance.
    """

    gpus: int = 1
    zero_stage: int = 0
    offload_optimizer: bool = False
    offload_parameters: bool = False
    shard_frozen: bool = False
    offload_frozen: bool = False
    compute: int = 2
    gradient: int = 4
    checkpointing: bool = True
    eager: bool = False
    bucket: int = 500_000_000
    live: int = 1_000_000_000
    prefetch: int = 50_000_000
    tile: int = 256 * 2**20
    on_cpu: bool = False

    @property
    def ranks(self) -> int:
        """Processes that share the work: plain torch has one."""
        return self.gpus if self.zero_stage else 1

    @property
    def autocast(self) -> bool:
        """Whether float32 weights are cast for each pass: plain torch in bfloat16."""
        return self.zero_stage == 0 and self.compute < FLOAT

    @property
    def sums_apart(self) -> bool:
        """Whether ZeRO 1 and 2 add up gradients in float32 beside those of the compute type."""
        return self.zero_stage in (1, 2) and self.gradient == FLOAT != self.compute


def total(terms: Bytes) -> float:
    """The sum of all terms."""
    return sum(terms.values())


def added(*parts: Bytes) -> Bytes:
    """The sum of several, term by term."""
    found: Bytes = {}
    for part in parts:
        for term, size in part.items():
            found[term] = found.get(term, 0) + size
    return found


def training_state(trained: int, setting: Setting) -> Bytes:
    """What one model in training always holds: its weights and Adam's m and v.

    Plain torch: 4T + 8T, all float32. ZeRO: wT + 12T/N, with the float32 masters among the 12; the
    weights are wT/N from stage 3 on, where float32 weights are their own masters (8T/N). What is
    offloaded is not on the GPU.
    """
    stage, n, w = setting.zero_stage, setting.ranks, setting.compute
    if stage == 0:
        return {"weights": FLOAT * trained, "optimizer": 8 * trained}
    weights = w * trained / (n if stage == 3 else 1)
    adam = 8 if stage == 3 and w == FLOAT and not setting.offload_optimizer else 12
    return {
        "weights": 0 if setting.offload_parameters else weights,
        "optimizer": 0 if setting.offload_optimizer else adam * trained / n,
    }


def gradients(trained: int, setting: Setting) -> Bytes:
    """Gradients that wait for the optimizer step.

    Plain torch: 4T. Stage 1 holds all of them, in g bytes; 2 and 3 gT/N. With an offloaded
    optimizer stage 3 sends each to the CPU at once, and so does stage 2 where it adds them up in
    the compute type; its sums in float32 stay on the GPU until the step, 4T/N.
    """
    stage = setting.zero_stage
    if stage == 0:
        return {"gradients": FLOAT * trained}
    if stage == 1:
        return {"gradients": max(setting.gradient, setting.compute) * trained}
    held = setting.gradient
    if setting.offload_optimizer and not setting.sums_apart:
        held = 0
    return {"gradients": held * trained / setting.ranks}


def offload_buffer(widest: int, setting: Setting) -> Bytes:
    """ZeRO 1 and 2 offload through a buffer on the GPU as large as the widest trained matrix.

    CPU processes touch it only where gradients are added up on the CPU.
    """
    touched = not (setting.on_cpu and setting.sums_apart)
    used = setting.offload_optimizer and setting.zero_stage < 3 and touched
    return {"communication": setting.compute * widest} if used else {}


def bucket(trained: int, setting: Setting) -> Bytes:
    """The buffer that collects gradients: of the compute type, in stage 1 of g bytes."""
    size = min(setting.bucket, trained) if setting.on_cpu else setting.bucket
    return {"communication": _reduced(setting) * size}


def reduction(trained: int, setting: Setting) -> Bytes:
    """A bucket is flattened into a second buffer, which the processes exchange."""
    return {"communication": _reduced(setting) * min(setting.bucket, trained)}


def step_copies(trained: int, setting: Setting) -> Bytes:
    """At the step, this process's share of the gradients once more in float32.

    Not where it is offloaded or, in stage 1 and 2, was accumulated in another type than the compute
    type; in stage 3 for groups of at most 1e9 weights.
    """
    stage, share = setting.zero_stage, trained / setting.ranks
    apart = stage < 3 and setting.gradient != setting.compute
    if stage == 0 or setting.offload_optimizer or apart:
        return {}
    return {"gradients": FLOAT * (min(share, SUB_GROUP) if stage == 3 else share)}


def frozen_weights(weights: float, setting: Setting) -> Bytes:
    """Weights that nothing trains, in the compute type: wP, or wP/N where they are sharded."""
    sharded = setting.shard_frozen and setting.zero_stage > 0
    return {"frozen models": setting.compute * weights / (setting.ranks if sharded else 1)}


def pass_weights(weights: int, setting: Setting, *, embedding: int = 0) -> Bytes:
    """What a pass over a trained model needs beside its weights as they are held.

    Stage 3 gathers them (`gathered`). Autocast keeps a bfloat16 copy of every matrix but the
    embedding until the pass ends.
    """
    if setting.zero_stage == 3:
        return gathered(weights, setting)
    if setting.autocast:
        return {"bfloat16 copies": setting.compute * (weights - embedding)}
    return {}


def gathered(weights: int, setting: Setting) -> Bytes:
    """Sharded weights during a pass: w for each, `live` at most, and again what is on its way."""
    coming = min(weights, setting.prefetch) if setting.ranks > 1 else 0
    return {"gathered weights": setting.compute * (min(weights, setting.live) + coming)}


def gathered_frozen(weights: int, setting: Setting) -> Bytes:
    """The same of a frozen model, where it is sharded."""
    sharded = setting.shard_frozen and setting.zero_stage > 0
    return gathered(weights, setting) if sharded else {}


def training_activations(
    shape: ModelShape, rows: int, length: int, setting: Setting, *, lora: bool = False
) -> Bytes:
    """What a forward pass keeps for the backward pass, for rows × length padded tokens.

    A layer keeps for each token, with r bytes of the residual stream (4 under autocast of float32
    weights, else w), Q and I the widths of queries and feed-forward layer: norms 2·(4 + r)·H, their
    outputs 2·w·H (5·w·H where autocast casts them for each linear layer), attention 5·w·Q (SDPA
    with a mask repeats keys and values to Q) and 4 for each head, feed-forward 4·w·I. Checkpointing
    keeps one layer's and r·H for each other. The backward pass of one layer adds 3·w·I + (r + 8)·H,
    the ends of the model 2·(4 + r)·H.
    """
    w, residual, tokens = setting.compute, _residual(setting, lora), rows * length
    inputs = 5 if residual != w else 2
    hidden, inner = shape.hidden, shape.intermediate
    layer = 2 * (FLOAT + residual) * hidden + inputs * w * hidden
    layer += w * 5 * shape.queries + FLOAT * shape.heads + 4 * w * inner
    if lora:
        layer += w * (5 * hidden + shape.queries + inner)
    layers = tokens * layer + _attention_square(shape, rows, length, setting)
    backward = tokens * (3 * w * inner + (residual + 8) * hidden)
    ends = tokens * (2 * FLOAT + 2 * residual) * hidden
    if setting.checkpointing:
        kept = layers + shape.layers * tokens * residual * hidden
    else:
        kept = shape.layers * layers
    return {"activations": kept + backward + ends}


def inference_activations(
    shape: ModelShape, rows: int, length: int, setting: Setting, *, trained: bool = False
) -> Bytes:
    """The working set of a pass without gradients: one layer's widest moment.

    A token takes (2r + 4)·H and the larger of attention's 5·w·Q and feed-forward's 3·w·I.
    """
    w, tokens = setting.compute, rows * length
    residual = _residual(setting, lora=not trained)
    widest = max(5 * shape.queries, 3 * shape.intermediate)
    layer = (2 * residual + FLOAT) * shape.hidden + w * widest
    return {"activations": tokens * layer + _attention_square(shape, rows, length, setting)}


def likelihood(
    shape: ModelShape, tokens: int, setting: Setting, *, trained: bool = False, head: bool = False
) -> Bytes:
    """The streamed likelihood of so many response tokens (core/likelihood.py).

    Two tiles of logits of `tile` bytes and the states, w·H a token; with gradients the states'
    gradient too, which is summed in float32, and, where the head itself is trained, its gradient,
    V·H in the weights' type.
    """
    w = setting.compute
    wanted = FLOAT * shape.vocabulary * tokens
    size = 2 * min(setting.tile, wanted)
    size += tokens * shape.hidden * (w + (w + FLOAT) * trained)
    if trained and head:
        size += shape.embedding * (FLOAT if setting.autocast else w)
    return {"likelihood": size}


def widest_gradient(shape: ModelShape, setting: Setting) -> Bytes:
    """The gradient of the largest matrix, the embedding, before it joins the accumulated ones."""
    return {"gradients": setting.compute * shape.embedding}


def kv_cache(shape: ModelShape, rows: int, length: int, setting: Setting) -> Bytes:
    """Keys and values of every layer, w·2·K·L a token, for rows of whole length from the start."""
    return {"KV cache": rows * length * 2 * setting.compute * shape.keys * shape.layers}


def drawing(shape: ModelShape, rows: int) -> Bytes:
    """Logits of one step, tempered, their probabilities, and a product: 4 bytes for each of V."""
    return {"rollout": rows * shape.vocabulary * 16}


def rollout_record(responses: int, length: int) -> Bytes:
    """A rollout's tensors: five of float32, two masks, and the update's advantages and returns."""
    return {"rollout": responses * length * (7 * FLOAT + 2)}


def loading(before: Bytes, weights: int, widest: int, setting: Setting) -> Bytes:
    """A model to be trained arrives.

    Plain torch: whole in float32. ZeRO 1 and 2: whole in the compute type, then flattened into a
    second copy. ZeRO 3: spread over the processes one weight after the other.
    """
    w = setting.compute
    if setting.zero_stage == 3:
        share = 0 if setting.offload_parameters else w * weights / setting.ranks
        return added(before, {"weights": share, "gathered weights": w * widest})
    return added(before, {"weights": weights * (2 * w if setting.zero_stage else FLOAT)})


def frozen_models(frozen: Bytes, setting: Setting) -> tuple[Bytes, Bytes, float]:
    """Where the frozen models are, which may be offloaded while they do not score.

    Offloaded, whole models come back to the GPU to score, and every process keeps its own on the
    CPU; sharded ones are fetched layer by layer.

    Args:
        frozen: Their bytes on one GPU.
        setting: How the stage is spread.

    Returns:
        Bytes on the GPU at all times, bytes on the GPU in addition while they score, and bytes in
        the CPUs' memory over all processes.
    """
    if not setting.offload_frozen:
        return frozen, {}, 0.0
    sharded = setting.shard_frozen and setting.zero_stage > 0
    return {}, {} if sharded else frozen, setting.ranks * total(frozen)


def _reduced(setting: Setting) -> int:
    """Bytes of a gradient in a bucket; plain torch has none."""
    if setting.zero_stage == 1:
        return max(setting.gradient, setting.compute)
    return setting.compute if setting.zero_stage else 0


def _residual(setting: Setting, lora: bool) -> int:
    return FLOAT if setting.autocast and not lora else setting.compute


def _attention_square(shape: ModelShape, rows: int, length: int, setting: Setting) -> float:
    """The mask of SDPA, or the weights that eager attention makes in float32 and in w."""
    each = shape.heads * (FLOAT + 2 * setting.compute) if setting.eager else 1 + setting.compute
    return rows * length**2 * each
