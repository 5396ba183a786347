"""A process of `test_deepspeed_engine.py`: trains a tiny policy and critic."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from denserl_cli.core.data.batches import collate_sequences, micro_batches
from denserl_cli.core.engine.base import NonFiniteError, step
from denserl_cli.core.engine.frozen import LocalModel, ShardedModel
from denserl_cli.core.engine.torch_engine import TorchEngine
from denserl_cli.core.models.causal_lm import hidden_states, response_logprobs
from denserl_cli.core.models.scalar_head import token_values
from denserl_cli.core.recipe.schema import EngineConfig, OptimizerConfig
from denserl_cli.core.sampling.base import Sampling
from denserl_cli.core.sampling.sampler import Sampler
from denserl_cli.core.sampling.torch_engine import TorchSampling
from denserl_cli.core.sampling.vllm_weights import weight_buckets
from denserl_cli.core.system import distributed
from tests import tiny

SETTINGS = OptimizerConfig(warmup_ratio=0.0, clip_norm=0.5)


def make_engine(
    model: torch.nn.Module,
    kind: str,
    stage: int,
    dtype: torch.dtype = torch.float32,
    offload: bool = False,
) -> TorchEngine:
    common = {
        "learning_rate": 1e-3,
        "settings": SETTINGS,
        "total_steps": 8,
        "compute_dtype": dtype,
    }
    if kind == "torch":
        return TorchEngine(model.train(), **common)
    from denserl_cli.core.engine.deepspeed_engine import DeepSpeedEngine

    # or nothing of a tiny model is sharded
    zero: dict[str, Any] = {"stage3_param_persistence_threshold": 0}
    if offload:  # as beside a GPU
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
    engine = EngineConfig(zero_stage=stage, deepspeed={"zero_optimization": zero})
    return DeepSpeedEngine(model.train(), engine=engine, **common)


def train(kind: str, stage: int, tied: bool) -> dict[str, Any]:
    """Four steps of a policy and a critic; a generation follows the second one.

    The third is left out: one gradient of the critic is NaN, in one process, its loss is not.
    """
    actor = make_engine(tiny.causal_lm(0, tied=tied), kind, stage)
    critic = make_engine(tiny.scalar_model(1), kind, stage)
    rng = np.random.default_rng(0)
    losses, norms, rates = [], [], []
    generated = sampled = torch.empty(0)
    for number in range(4):
        prompts = [rng.integers(1, 20, rng.integers(1, 6)) for _ in range(8)]
        responses = [rng.integers(1, 20, rng.integers(1, 9)) for _ in range(8)]
        lengths = [len(p) + len(r) for p, r in zip(prompts, responses, strict=True)]
        parts = distributed.shard_micro_batches(micro_batches(lengths, np.arange(8), 2))
        total = torch.zeros(2)
        for turn, (part, _) in enumerate(parts, 1):
            found = []
            for row in part:  # a pass each, and one backward pass through all
                batch = collate_sequences([prompts[row]], [responses[row]], 0)
                logprobs = actor(response_logprobs, batch, with_entropy=False).logprobs
                values = critic(token_values, batch, before=True)
                found.append((-logprobs.sum() / 64, (values - 1).square().sum() / 64))
            pair = [sum(losses) for losses in zip(*found, strict=True)]
            last = turn == len(parts)
            actor.backward(pair[0], last=last)
            spoilt = number == 2 and last and distributed.is_main_process()
            critic.backward(pair[1] + (values.sum() * 0).sqrt() if spoilt else pair[1], last=last)
            total += torch.stack([loss.detach() for loss in pair])
        losses.append(distributed.all_reduce_sum(total))
        rates.append(actor.learning_rate)
        if number == 2:
            with pytest.raises(NonFiniteError, match="the gradient norm is"):
                step(actor, critic)
            continue
        norms += [norm.float() for norm in step(actor, critic)]
        if number == 1:
            generated, sampled = generate(actor), sample(actor)
    sent = sent_weights(actor, stage)
    weights = actor.weights()
    if weights is not None:
        assert all(
            torch.equal(sent[name], weight.to(sent[name])) for name, weight in weights.items()
        )
    figures = {"losses": torch.stack(losses), "norms": torch.stack(norms)}
    figures |= {"rates": torch.tensor(rates), "generated": generated, "sampled": sampled}
    return {**figures, "weights": weights}


def sent_weights(actor: TorchEngine, stage: int) -> dict[str, torch.Tensor]:
    """All weights as a vLLM gets them; under ZeRO 3 they are never in place together."""
    found: dict[str, torch.Tensor] = {}
    for bucket in weight_buckets(actor, torch.float32, limit=4096):
        found |= bucket
        away = [p for p in actor.model.parameters() if stage == 3 and not p.numel()]
        assert away or stage != 3
    return found


def leaves_out_in_half_precision(stage: int, offload: bool) -> None:
    """A step whose gradient is NaN changes nothing; the one after it is as if it were the first."""
    engine = make_engine(tiny.causal_lm(0), "deepspeed", stage, torch.bfloat16, offload)
    other = make_engine(tiny.causal_lm(0), "deepspeed", stage, torch.bfloat16, offload)
    batch = collate_sequences([np.array([3, 5])] * 2, [np.array([4, 6, 2])] * 2, 0)
    found = []
    for spoilt in (True, False):
        logprobs = engine(response_logprobs, batch, with_entropy=False).logprobs
        loss = -logprobs.mean()
        engine.backward(loss + (logprobs.sum() * 0).sqrt() if spoilt else loss)
        with pytest.raises(NonFiniteError) if spoilt else nullcontext():
            step(engine)
        with engine.gathered() as model:
            found.append(torch.cat([p.detach().flatten() for p in model.parameters()]).clone())
    start = torch.cat([p.detach().flatten() for p in tiny.causal_lm(0).parameters()])
    assert torch.equal(found[0], start.bfloat16())
    assert torch.isfinite(found[1]).all() and not torch.equal(*found)
    other.backward(-other(response_logprobs, batch, with_entropy=False).logprobs.mean())
    step(other)
    with other.gathered() as model:
        first = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert torch.equal(found[1], first)


def computes_values_in_float32(stage: int) -> None:
    """The scalar head in a run in bfloat16, while it is trained and in the saved weights."""
    engine = make_engine(tiny.scalar_model(1), "deepspeed", stage, torch.bfloat16)
    start = {name: value.clone() for name, value in tiny.scalar_model(1).state_dict().items()}
    batch = collate_sequences([np.array([3, 5])] * 4, [np.array([4, 6, 2])] * 4, 0)
    for trained in (False, True):
        weights = engine.weights()
        values = engine(token_values, batch)
        states = engine(hidden_states, batch)[batch.response_positions].float()
        if weights is not None:
            head = weights["score.weight"]
            assert torch.equal(head, start["score.weight"]) is not trained
            expected = batch.window((states @ head.T)[:, 0])
            torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-5)
            body = weights["model.norm.weight"]
            assert body.dtype == torch.float32
            assert torch.equal(body, body.bfloat16().float()) is not trained  # masters
        engine.backward((values - 1).square().mean() / distributed.world_size())
        step(engine)


def scores_in_shards_as_whole() -> None:
    """A frozen reward model in bfloat16 whose weights are spread over the processes."""
    batch = collate_sequences([np.array([3, 5])] * 4, [np.array([4, 6, 2])] * 4, 0)
    models = [tiny.scalar_model(1) for _ in range(2)]
    for model in models:
        for weight in model.model.parameters():
            weight.data = weight.data.bfloat16()
    whole = LocalModel(models[0], torch.bfloat16)(token_values, batch)
    shards = ShardedModel(models[1], EngineConfig(), torch.bfloat16)(token_values, batch)
    torch.testing.assert_close(shards, whole, rtol=0, atol=1e-5)


def generate(actor: TorchEngine) -> torch.Tensor:
    """Six tokens; each process asks for another number, which is no collective call."""
    with actor.gathered() as model, torch.no_grad():
        model.eval()
        tokens = 4 + distributed.rank()
        out = model.generate(
            torch.tensor([[3, 5]]), max_new_tokens=tokens, do_sample=False, pad_token_id=0
        )
        model.train()
    return out[0, :6]


def sample(actor: TorchEngine) -> torch.Tensor:
    """Responses to five prompts one after another; each process draws its share of them."""
    prompts = [np.arange(1, 2 + row, dtype=np.int32) for row in range(5)]
    keys = [(3, row) for row in range(5)]
    sampler = Sampler(TorchSampling(actor, rows=2, pad_id=0))
    drawn = sampler.sample(prompts, keys, Sampling(24, stop_ids=(5,)))
    return torch.from_numpy(np.concatenate([response.ids for response in drawn]))


def main(tied: str, out: str) -> None:
    """Train once for each stage in one process group; the first process writes what it found."""
    distributed.join()
    found = {stage: train("deepspeed", stage, tied == "tied") for stage in (1, 2, 3)}
    for stage in (1, 2, 3):
        for offload in (False, True):
            leaves_out_in_half_precision(stage, offload)
        computes_values_in_float32(stage)
    scores_in_shards_as_whole()
    if distributed.is_main_process():
        torch.save(found, Path(out))
    distributed.leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
