"""Packed sequences give what padded ones give; models that cannot read them are found."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    GPT2Config,
    JambaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen3Config,
    Qwen3NextConfig,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from denserl_cli.core.data.batches import SequenceBatch, collate_sequences
from denserl_cli.core.data.packing import pack_sequences
from denserl_cli.core.models.causal_lm import hidden_states, response_logprobs
from denserl_cli.core.models.packed_attention import in_one_call, register
from denserl_cli.core.models.packing_support import can_pack, packs, wants_packing
from denserl_cli.core.models.scalar_head import token_values
from tests.fakes import RecordingObserver
from tests.tiny import causal_lm, frozen, scalar_model

PROMPTS = [[3, 4, 5], [6], [7, 8, 9, 10], [3, 4, 5], [6]]
RESPONSES = [[11, 12], [13, 14, 15, 16, 2], [2], [2, 2, 17, 18], [19]]
SHAPE = {
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "initializer_range": 0.3,
}


def both() -> tuple[SequenceBatch, SequenceBatch]:
    """The same sequences padded and packed."""
    return collate_sequences(PROMPTS, RESPONSES, 0), pack_sequences(PROMPTS, RESPONSES, 0)


def model_of(config: PreTrainedConfig, attention: str = "sdpa") -> torch.nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_values_and_gradients_are_those_of_padded_sequences(checkpointing: bool):
    model = scalar_model().train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    found = []
    for batch in both():
        values = token_values(model, batch)
        before = token_values(model, batch, before=True)
        model.zero_grad()
        (values.square() + before.sin()).masked_fill(~batch.response_mask, 0).sum().backward()
        gradients = [parameter.grad.clone() for parameter in model.parameters()]
        found.append([values.detach(), before.detach(), *gradients])
    for padded, packed in zip(*found, strict=True):
        torch.testing.assert_close(packed, padded, rtol=1e-4, atol=1e-5)


def test_likelihoods_and_entropies_are_those_of_padded_sequences():
    with torch.no_grad():
        padded, packed = (response_logprobs(causal_lm(), batch) for batch in both())
    for one, other in zip(padded, packed, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [None, 3])
def test_grouped_heads_and_sliding_windows_keep_their_meaning(window: int | None):
    model = model_of(MistralConfig(**SHAPE, num_key_value_heads=2, sliding_window=window))
    with torch.no_grad():
        padded, packed = (hidden_states(model, batch)[batch.response_positions] for batch in both())
    torch.testing.assert_close(packed, padded, rtol=1e-4, atol=1e-5)


def test_each_token_sees_what_a_block_mask_lets_it_see():
    torch.manual_seed(0)
    batch = both()[1]
    packing, total = batch.packing, batch.input_ids.shape[1]
    assert packing is not None and packing.tokens is not None
    query, key, value = torch.randn(3, 1, 2, total, 8).unbind()
    mask = torch.zeros(total, total, dtype=torch.bool)
    rows = packing.tokens.split(packing.whole)
    for own, tokens in zip(packing.own, rows, strict=True):
        for at in range(len(tokens) - own, len(tokens)):
            mask[tokens[at], tokens[: at + 1]] = True
    expected = scaled_dot_product_attention(query, key, value, attn_mask=mask)
    register()
    found, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](
        torch.nn.Module(), query, key, value, None, packing=packing
    )
    torch.testing.assert_close(found.transpose(1, 2), expected)

    def kernel(_: object, q: Tensor, k: Tensor, v: Tensor, mask: None, **options) -> tuple:
        """As FlashAttention does: causal from the end of each sequence's queries and keys."""
        q_ends, k_ends = options["cu_seq_lens_q"].tolist(), options["cu_seq_lens_k"].tolist()
        assert options["max_length_q"] == max(packing.own)
        assert options["max_length_k"] == max(packing.whole)
        outputs = []
        for number in range(len(packing.own)):
            mine = q[:, :, q_ends[number] : q_ends[number + 1]]
            keys, values = (x[:, :, k_ends[number] : k_ends[number + 1]] for x in (k, v))
            sees = torch.ones(mine.shape[2], keys.shape[2], dtype=torch.bool)
            sees = sees.tril(keys.shape[2] - mine.shape[2])
            outputs.append(scaled_dot_product_attention(mine, keys, values, attn_mask=sees))
        return torch.cat(outputs, dim=2).transpose(1, 2), None

    found, _ = in_one_call(kernel, packing, torch.nn.Module(), query, key, value)
    torch.testing.assert_close(found.transpose(1, 2), expected)


ABLE = {
    "qwen3": Qwen3Config(**SHAPE, num_key_value_heads=2, head_dim=4),
    "gpt2": GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, initializer_range=0.3),
    "mistral": MistralConfig(**SHAPE, num_key_value_heads=2, sliding_window=4),
}
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0], "long_factor": [2.0]}
UNABLE = {
    "longrope": MistralConfig(
        **{**SHAPE, "hidden_size": 8}, num_key_value_heads=2, head_dim=2, rope_parameters=LONG
    ),
    "bloom": BloomConfig(vocab_size=32, hidden_size=16, n_layer=2, n_head=2),
    "falcon": FalconConfig(**SHAPE, alibi=True),
    "jamba": JambaConfig(**SHAPE, num_key_value_heads=2, use_mamba_kernels=False),
    "qwen3-next": Qwen3NextConfig(
        **SHAPE, num_key_value_heads=2, num_experts=2, num_experts_per_tok=1
    ),
    "chunked": MistralConfig(**SHAPE, num_key_value_heads=2, attention_chunk_size=8),
}


@pytest.mark.parametrize("name", ABLE)
def test_architectures_that_read_packed_sequences_are_found(name: str):
    model = model_of(ABLE[name])
    assert can_pack(model) and can_pack(model.bfloat16())


@pytest.mark.parametrize("name", UNABLE)
def test_other_architectures_are_found(name: str):
    kernel = "sdpa" if name in ("longrope", "chunked") else "eager"
    assert not can_pack(model_of(UNABLE[name], kernel))


def test_a_model_that_mixes_sequences_up_is_found(monkeypatch: pytest.MonkeyPatch):
    model = causal_lm()
    real = model.base_model.layers[0].forward
    monkeypatch.setattr(
        model.base_model.layers[0], "forward", lambda x, **o: real(x.cumsum(1), **o)
    )
    assert not can_pack(model)
    assert not model.training


def test_packing_is_the_default_on_cpus_and_can_be_switched_off():
    model, recorder = causal_lm(), RecordingObserver()
    assert wants_packing(model, None) and not wants_packing(model, False)
    assert packs([frozen(model)], None, recorder) and packs([frozen(model)], True, recorder)
    assert not packs([frozen(model), frozen(causal_lm())], False, recorder)
    assert not recorder.notices
    assert not wants_packing(model_of(ABLE["qwen3"], "eager"), True)  # no kernel for it


def test_padding_because_of_the_architecture_is_said():
    recorder = RecordingObserver()
    model = model_of(UNABLE["chunked"])
    assert not packs([frozen(model)], None, recorder)
    assert recorder.notices == ["sequences are padded: this architecture cannot read them packed"]
