"""The attention of the last token, recomputed, is that of eager attention."""

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from denserl_cli.core.data.batches import collate_sequences
from denserl_cli.core.errors import DenserlError
from denserl_cli.core.models.attention_row import attention_calls, refuse_hidden_attention
from denserl_cli.core.models.scalar_head import read_more, token_values

SHAPE = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "num_labels": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS = {
    "llama": {},
    "qwen3": {},  # norms of queries and keys
    "mistral": {"sliding_window": 4},
    "gemma2": {"sliding_window": 4, "query_pre_attn_scalar": 16},  # soft caps
    "gpt2": {"n_layer": 2, "n_embd": 32, "n_head": 4, "n_positions": 64},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2},  # sinks
}
PROMPTS = [np.arange(3, 3 + n) for n in (3, 5)]
RESPONSES = [np.arange(10, 10 + n) for n in (7, 4)]


def model(kind: str, kernel: str):
    config = AutoConfig.for_model(kind, **{**SHAPE, **MODELS.get(kind, {})})
    torch.manual_seed(0)
    made = AutoModelForSequenceClassification.from_config(config, attn_implementation=kernel)
    return made.eval()


@torch.no_grad()
@pytest.mark.parametrize("kind", MODELS)
def test_it_is_that_of_eager_attention(kind: str):
    eager = model(kind, "eager")
    batch = collate_sequences(PROMPTS, RESPONSES, 0)
    kernels = ["eager"] if kind in ("gemma2", "gpt_oss") else ["eager", "sdpa"]
    for kernel in kernels:
        scorer = model(kind, kernel)
        found = read_more(scorer, batch, wanted=["attention", "prompt_value"])
        assert torch.equal(found.token_values, token_values(scorer, batch))
        before = token_values(scorer, batch, before=True)[:, 0]
        assert torch.equal(found.more["prompt_value"], before)
        for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
            ids = torch.tensor(np.concatenate([prompt, response]))[None]  # alone, without padding
            layers = eager.base_model(input_ids=ids, output_attentions=True).attentions
            expected = layers[-1][0, :, -1].mean(0)[len(prompt) :]
            torch.testing.assert_close(
                found.more["attention"][row, : len(response)],
                expected / expected.sum(),
                rtol=0,
                atol=1e-6,
            )
        assert not found.more["attention"][1, 4:].any()
        torch.testing.assert_close(found.more["attention"].sum(1), torch.ones(2))


@torch.no_grad()
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_kernels_are_as_before_afterwards(kernel: str):
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    before = ALL_ATTENTION_FUNCTIONS.get(kernel)
    with pytest.raises(ZeroDivisionError), attention_calls(model("llama", kernel)):
        assert ALL_ATTENTION_FUNCTIONS[kernel] is not before
        raise ZeroDivisionError
    assert ALL_ATTENTION_FUNCTIONS.get(kernel) is before


def test_attention_that_cannot_be_read_is_refused():
    refuse_hidden_attention(model("llama", "sdpa"), "there")
    with pytest.raises(DenserlError, match="there: the attention of a bloom model cannot be read"):
        refuse_hidden_attention(model("bloom", "eager"), "there")
