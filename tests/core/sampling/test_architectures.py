"""Tokens are drawn from what the full pass says, in architectures of every kind of cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    DeepseekV3Config,
    FalconH1Config,
    Gemma3TextConfig,
    GPTJConfig,
    JambaConfig,
    MistralConfig,
    MixtralConfig,
    MptConfig,
    Phi3Config,
    PhimoeConfig,
    Qwen2Config,
    Qwen3_5TextConfig,
    Qwen3NextConfig,
    RwkvConfig,
)

from denserl_cli.core.data.batches import collate_sequences
from denserl_cli.core.errors import DenserlError
from denserl_cli.core.models import load_checks
from denserl_cli.core.models.causal_lm import load_causal_lm, response_logprobs
from denserl_cli.core.recipe.schema import ModelConfig
from denserl_cli.core.sampling.base import Sampling
from denserl_cli.core.sampling.draw import draw, noise
from tests import tiny

WINDOW, TOKENS = 8, 24
LONG = [np.arange(1, 1 + length, dtype=np.int32) for length in (3, 12, 21)]  # beyond it
SHAPE = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
FEW = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
MAMBA = {"mamba_d_state": 8, "mamba_d_conv": 4, "mamba_expand": 2}
OLD = {"vocab_size": 32, "hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.3}

ARCHITECTURES = {
    "mistral": lambda: MistralConfig(**SHAPE, sliding_window=WINDOW),
    "phi3": lambda: Phi3Config(**SHAPE, sliding_window=WINDOW),
    "qwen2": lambda: Qwen2Config(
        **SHAPE, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1
    ),
    "gemma3": lambda: Gemma3TextConfig(
        **SHAPE,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"] * 2,
    ),
    "mixtral": lambda: MixtralConfig(**SHAPE, **EXPERTS, router_jitter_noise=0.3),
    "phimoe": lambda: PhimoeConfig(
        **SHAPE, **EXPERTS, router_jitter_noise=0.1, input_jitter_noise=0.1
    ),
    "deepseek-v3": lambda: DeepseekV3Config(
        **{**SHAPE, "num_key_value_heads": 4, "head_dim": 4},
        **{"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4},
        **{"v_head_dim": 8, "n_routed_experts": 4, "n_group": 1, "topk_group": 1},
        **{"num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 1},
    ),
    "qwen3-next": lambda: Qwen3NextConfig(
        **SHAPE, **LINEAR, **FEW, shared_expert_intermediate_size=16
    ),
    "qwen3.5": lambda: Qwen3_5TextConfig(**SHAPE, **LINEAR),
    "jamba": lambda: JambaConfig(
        **SHAPE, **MAMBA, num_experts=2, attn_layer_offset=1, attn_layer_period=2, mamba_dt_rank=8
    ),
    "falcon-h1": lambda: FalconH1Config(
        **SHAPE, **MAMBA, mamba_d_ssm=64, mamba_n_heads=8, mamba_d_head=8, mamba_chunk_size=8
    ),
    "gpt-j": lambda: GPTJConfig(
        vocab_size=32, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, initializer_range=0.3
    ),
    "bloom": lambda: BloomConfig(**OLD),
    "mpt": lambda: MptConfig(
        vocab_size=32, d_model=32, n_layers=2, n_heads=4, max_seq_len=64, initializer_range=0.3
    ),
}


def saved(config: Any, folder: Path) -> ModelConfig:
    """A folder with a model of random weights that have an opinion."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for weight in model.parameters():
        if weight.ndim > 1 and weight.std() < 0.1:
            torch.nn.init.normal_(weight, std=0.2)
    model.save_pretrained(folder)
    return ModelConfig(path=str(folder), dtype="float32", gradient_checkpointing=False)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_samples_are_those_of_the_full_pass(name: str, tmp_path: Path):
    """Beyond the window, with padding, with rows that leave; and the ratio to itself is 1."""
    policy = load_causal_lm(saved(ARCHITECTURES[name](), tmp_path), trained=False)
    sampling = Sampling(max_new_tokens=TOKENS, stop_ids=(5,))
    keys = [(7, row) for row in range(len(LONG))]
    uniform = noise(keys, TOKENS)
    drawn = tiny.sampler(policy).sample(LONG, keys, sampling)
    assert sum(len(response.ids) for response in drawn) > WINDOW
    for row, (prompt, response) in enumerate(zip(LONG, drawn, strict=True)):
        ids = torch.from_numpy(np.concatenate([prompt, response.ids]).astype(np.int64))[None]
        with torch.no_grad():
            logits = policy(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
        expected, *_ = draw(logits, uniform[row, : len(response.ids)], temperature=1.0, top_p=1.0)
        assert response.ids.tolist() == expected.tolist()
    batch = collate_sequences(LONG, [response.ids for response in drawn], 0)
    with torch.no_grad():
        measured = response_logprobs(policy, batch).logprobs
        trained = response_logprobs(policy.train(), batch).logprobs
    torch.testing.assert_close(trained, measured, atol=1e-4, rtol=1e-4)


def test_a_model_that_cannot_be_sampled_from_is_refused_at_load(tmp_path: Path):
    shape = RwkvConfig(vocab_size=32, hidden_size=32, num_hidden_layers=2, intermediate_size=48)
    with pytest.raises(DenserlError, match="cannot be sampled from a rwkv model"):
        load_causal_lm(saved(shape, tmp_path), trained=False)


def test_a_cache_that_forgets_or_raises_is_refused_at_load(tmp_path: Path, monkeypatch):
    model = saved(ARCHITECTURES["mistral"](), tmp_path)
    load_causal_lm(model, trained=False)
    monkeypatch.setattr(load_checks, "_PASSED", set())
    from transformers import DynamicCache

    whole = DynamicCache.update

    def forgetful(cache, keys, values, layer, *more):
        keys, values = whole(cache, keys, values, layer, *more)
        return keys * 0.5, values

    with monkeypatch.context() as broken:
        broken.setattr(DynamicCache, "update", forgetful)
        with pytest.raises(DenserlError, match="reads otherwise with its cache"):
            load_causal_lm(model, trained=False)

    def refuses(*_):
        raise AttributeError("no such thing")

    with monkeypatch.context() as broken:
        broken.setattr(DynamicCache, "reorder_cache", refuses)
        with pytest.raises(DenserlError, match="AttributeError: no such thing"):
            load_causal_lm(model, trained=False)
