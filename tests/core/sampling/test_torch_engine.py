"""Sampling: exact inversion, no dependence on the batch, nothing hidden."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig

from denserl_cli.core.engine.frozen import LocalModel
from denserl_cli.core.errors import DenserlError
from denserl_cli.core.models.attention import attention_kernel
from denserl_cli.core.recipe.schema import ModelConfig
from denserl_cli.core.sampling import torch_engine
from denserl_cli.core.sampling.base import Response, Sampling
from denserl_cli.core.sampling.decoder import Decoder, Head
from denserl_cli.core.sampling.draw import noise
from denserl_cli.core.sampling.limits import MOST_ROWS
from denserl_cli.core.sampling.sampler import Sampler
from denserl_cli.core.sampling.torch_engine import TorchSampling, fitting_rows
from tests import tiny

STOPS = (5, 11)
SAMPLING = Sampling(max_new_tokens=8, stop_ids=STOPS, temperature=0.9)
PROMPTS = [np.arange(1, 1 + length, dtype=np.int32) for length in (3, 1, 7, 4, 2, 9, 5, 6)]


@pytest.fixture(scope="module")
def model():
    return tiny.causal_lm()


KEYS = [(0, 1, row, 0) for row in range(len(PROMPTS))]


def sample(model, prompts=PROMPTS, sampling=SAMPLING, keys=KEYS, rows=None, pad_id=0, **options):
    return tiny.sampler(model, rows, pad_id).sample(prompts, keys, sampling, **options)


def same(left: list[Response], right: list[Response]) -> bool:
    return [(r.ids.tolist(), r.terminated) for r in left] == [
        (r.ids.tolist(), r.terminated) for r in right
    ]


@torch.no_grad()
def by_hand(model, prompt: np.ndarray, sampling: Sampling, key) -> Response:
    """One token at a time, the whole sequence through the model each time."""
    ids, logprobs, entropy = prompt.tolist(), [], []
    for number in noise([key], sampling.max_new_tokens)[0]:
        logits = model(torch.tensor([ids])).logits[0, -1].double()
        probabilities = torch.softmax(logits / sampling.temperature, 0)
        ids.append(int((probabilities.cumsum(0) > number).nonzero()[0]))
        logprobs.append(float(probabilities[ids[-1]].log()))
        entropy.append(float(-(probabilities * probabilities.log()).sum()))
        if ids[-1] in sampling.stop_ids:
            break
    written = np.array(ids[len(prompt) :])
    ended = ids[-1] in sampling.stop_ids
    return Response(written, ended, np.array(logprobs), np.array(entropy))


def all_by_hand(model) -> list[Response]:
    """Every response as one token at a time gives it."""
    pairs = zip(PROMPTS, KEYS, strict=True)
    return [by_hand(model, prompt, SAMPLING, key) for prompt, key in pairs]


def test_a_sample_is_what_one_token_at_a_time_gives(model):
    found, expected = sample(model), all_by_hand(model)
    assert same(found, expected)
    assert {r.terminated for r in found} == {True, False}
    assert {int(r.ids[-1]) for r in found if r.terminated} == set(STOPS)
    for one, other in zip(found, expected, strict=True):
        assert one.logprobs.dtype == np.float32
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)
        np.testing.assert_allclose(one.entropy, other.entropy, atol=1e-5)


def test_neither_batch_nor_order_changes_a_response(model):
    together = sample(model)
    alone = [
        sample(model, [prompt], keys=[key])[0] for prompt, key in zip(PROMPTS, KEYS, strict=True)
    ]
    backwards = sample(model, PROMPTS[::-1], keys=KEYS[::-1])[::-1]
    assert same(together, alone) and same(together, backwards)


def test_padding_with_a_stop_token_changes_nothing(model):
    expected = sample(model)
    assert same(sample(model, pad_id=STOPS[0]), expected)


def test_a_stop_token_in_the_prompt_stops_nothing(model):
    prompts = [np.array([5, 3, 11, 5]), np.array([2])]
    found = sample(model, prompts, keys=KEYS[:2], pad_id=5)
    expected = [by_hand(model, p, SAMPLING, k) for p, k in zip(prompts, KEYS, strict=False)]
    assert same(found, expected)


def passes(model, **options) -> tuple[list[Response], list[tuple[int, int]]]:
    """The responses, and the shape of the ids of every pass after the check at the start."""
    shapes: list[tuple[int, int]] = []
    hook = model.model.register_forward_pre_hook(
        lambda _, __, inputs: shapes.append(tuple(inputs["input_ids"].shape)), with_kwargs=True
    )
    found = sample(model, **options)
    hook.remove()
    return found, shapes[4:]


def test_rows_that_have_ended_leave_the_batch(model):
    found, shapes = passes(model)
    lengths = [len(response.ids) for response in found]
    assert shapes[0] == (8, 9)  # the prompts
    going = [sum(n > step for n in lengths) for step in range(1, max(lengths))]
    assert shapes[1:] == [(n, 1) for n in going]
    assert going[-1] < len(PROMPTS)


def test_a_batch_ends_with_its_last_row(model):
    every = Sampling(max_new_tokens=10, stop_ids=tuple(range(20)))
    found, shapes = passes(model, sampling=every)
    assert len(shapes) == 1
    assert [(len(r.ids), r.terminated) for r in found] == [(1, True)] * len(PROMPTS)


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 100])
def test_rows_are_filled_again_and_change_nothing(model, rows: int):
    found, shapes = passes(model, rows=rows)
    assert same(found, sample(model))
    # a prompt of one token reads like a step
    read = sum(count for count, width in shapes if width > 1)
    assert read >= len(PROMPTS) - 1 and max(count for count, _ in shapes) <= rows
    lengths = sum(len(response.ids) for response in found)
    assert sum(count for count, _ in shapes) == lengths  # nothing is computed in vain


def test_the_length_limit_leaves_a_response_unterminated(model):
    never = Sampling(max_new_tokens=6, stop_ids=(19_999,))
    found = sample(model, sampling=never)
    assert [(len(r.ids), r.terminated) for r in found] == [(6, False)] * len(PROMPTS)


def test_a_stop_token_on_the_last_place_terminates(model):
    response = next(r for r in sample(model) if r.terminated)
    limit = SAMPLING._replace(max_new_tokens=len(response.ids))
    again = sample(model, sampling=limit)
    assert response.ids.tolist() in [r.ids.tolist() for r in again if r.terminated]


def test_the_cold_limit_is_greedy_generation(model):
    greedy = Sampling(max_new_tokens=12, stop_ids=STOPS, temperature=1e-5)
    found = sample(model, sampling=greedy)
    for prompt, response in zip(PROMPTS, found, strict=True):
        ids = torch.from_numpy(prompt.astype(np.int64))[None]
        expected = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=12,
            eos_token_id=list(STOPS),
            pad_token_id=0,
        )[0, len(prompt) :]
        assert response.ids.tolist() == expected.tolist()


def test_temperature_0_takes_the_likeliest_token(model):
    greedy, cold = (SAMPLING._replace(temperature=t) for t in (0.0, 1e-5))
    found = sample(model, sampling=greedy)
    assert same(found, sample(model, sampling=cold))


def test_each_row_may_have_a_limit_of_its_own(model):
    whole = sample(model)
    limits = [1, 8, 3, 2, 8, 1, 5, 4]
    found = sample(model, limits=limits)
    expected = [
        Response(r.ids[:limit], r.terminated and len(r.ids) <= limit, r.logprobs[:limit])
        for r, limit in zip(whole, limits, strict=True)
    ]
    assert same(found, expected)
    assert not same(found, whole)


def test_nothing_of_a_generation_config_leaks_in(model):
    expected = sample(model)
    other = tiny.causal_lm()
    other.generation_config.update(
        do_sample=True,
        temperature=0.1,
        top_k=1,
        top_p=0.1,
        repetition_penalty=5.0,
        eos_token_id=3,
        max_new_tokens=2,
        bad_words_ids=[[7]],
    )
    assert same(sample(other), expected)


# other models


SMALL = {
    "vocab_size": 20,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
FAMILIES = {
    "Qwen2": {},
    "Qwen3": {"head_dim": 16},
    "Phi3": {},
    "Mistral": {"sliding_window": 4},
    "Gemma2": {"head_dim": 16, "sliding_window": 4, "query_pre_attn_scalar": 16},
    "Gemma3": {"head_dim": 16, "sliding_window": 4, "query_pre_attn_scalar": 16},
    "GPTNeoX": {},
    "Olmo2": {},
}


def family(name: str, **settings):
    kind = f"{name}Text" if name == "Gemma3" else name
    torch.manual_seed(1)
    config = getattr(transformers, f"{kind}Config")(**SMALL, **FAMILIES[name] | settings)
    if name == "Gemma2":
        config._attn_implementation = "eager"  # the kernel that caps logits
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


@pytest.mark.parametrize("name", FAMILIES)
def test_windows_caps_and_other_families(name: str):
    model = family(name, **({"final_logit_softcapping": None} if name == "Gemma2" else {}))
    assert Decoder(model).can_advance()
    before = model.config._attn_implementation
    found = sample(model, rows=3)
    assert same(found, all_by_hand(model))
    assert model.config._attn_implementation == before


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("Mistral", {"sliding_window": 70}),
        ("Gemma3", {"sliding_window": 70}),
        ("Gemma2", {"sliding_window": 70, "final_logit_softcapping": None}),
        ("Gemma2", {"attn_logit_softcapping": 0.5, "final_logit_softcapping": None}),
    ],
)
def test_windows_and_caps_over_a_long_cache(name: str, settings: dict):
    """Beyond one step of columns and the window, beside transformers' own pass over the whole."""
    model = family(name, **settings)
    prompts = [np.random.default_rng(row).integers(1, 20, 30 + 60 * row) for row in range(4)]
    found = sample(model, prompts, Sampling(100, ()), KEYS[:4], rows=3)
    for prompt, response in zip(prompts, found, strict=True):
        assert len(response.ids) == 100
        ids = torch.from_numpy(np.concatenate([prompt, response.ids]))[None]
        logits = model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1)[range(100), response.ids].numpy()
        np.testing.assert_allclose(response.logprobs, expected, atol=1e-4)


def test_a_cap_on_the_logits_is_not_left_to_sdpa():
    kinds = {"Gemma2": "eager", "Gemma3": "sdpa", "Mistral": "sdpa"}
    for name, kernel in kinds.items():
        kind = getattr(transformers, f"{name}ForCausalLM")
        assert attention_kernel(ModelConfig(path="model", dtype="float32"), kind) == kernel


def test_adapters_that_are_not_merged():
    model = tiny.causal_lm()
    before = sample(model)
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"]))
    assert same(sample(model), before)  # an adapter starts as zeros
    torch.manual_seed(2)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    found = sample(model.eval(), rows=3)
    assert same(found, all_by_hand(model)) and not same(found, before)


def test_a_model_whose_attention_is_its_own_is_sampled_in_padded_batches():
    torch.manual_seed(1)
    config = transformers.BloomConfig(
        vocab_size=20, hidden_size=16, n_layer=2, n_head=2, initializer_range=0.3
    )
    model = transformers.BloomForCausalLM(config).eval()
    assert not Decoder(model).can_advance()
    found = sample(model, rows=3)
    assert same(found, all_by_hand(model))


# other numbers


def test_float32_weights_are_in_the_compute_type_only_meanwhile():
    model = tiny.causal_lm()
    kept = {name: weight.clone() for name, weight in model.named_parameters()}
    places = {name: weight.data_ptr() for name, weight in model.named_parameters()}
    seen: set[torch.dtype] = set()
    hook = model.model.register_forward_pre_hook(
        lambda *_: seen.update(weight.dtype for weight in model.parameters())
    )
    engine = TorchSampling(LocalModel(model, torch.bfloat16), rows=None, pad_id=0)
    found = Sampler(engine).sample(PROMPTS, KEYS, SAMPLING)
    hook.remove()
    assert seen == {torch.bfloat16} and not engine.exact
    for name, weight in model.named_parameters():
        assert torch.equal(weight, kept[name]) and weight.data_ptr() == places[name]
    rounded = Sampler(TorchSampling(LocalModel(model.bfloat16(), torch.bfloat16), rows=8, pad_id=0))
    assert same(found, rounded.sample(PROMPTS, KEYS, SAMPLING))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_float32_sums_of_the_models_own_numbers(dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(300, 64, generator=generator).to(dtype)
    states = torch.randn(5, 64, generator=generator).to(dtype)
    logits = Head(weight)(states)
    assert logits.dtype is torch.float32
    torch.testing.assert_close(
        logits.double(), states.double() @ weight.double().T, rtol=0, atol=2e-5
    )


def test_rows_are_as_many_as_memory_allows(model, monkeypatch):
    decoder = Decoder(model)
    assert decoder.can_advance()
    # 2 layers × keys and values × 16 numbers of 4 bytes × 64 columns, and 16 bytes × 20 of logits
    row = 2 * 2 * 16 * 4 * 64 + 16 * 20
    assert fitting_rows(decoder, 50) == MOST_ROWS
    for free, rows in ((2 * row, 1), (7 * row, 3)):
        monkeypatch.setattr(torch_engine, "free_memory", lambda _, free=free: free)
        assert fitting_rows(decoder, 50) == rows
    monkeypatch.setattr(torch_engine, "free_memory", lambda _: row)
    with pytest.raises(DenserlError, match="one response of 50 tokens") as caught:
        fitting_rows(decoder, 50)
    assert "ppo.rollout.max_new_tokens" in (caught.value.hint or "")


def test_few_looks_change_nothing(model, monkeypatch):
    expected = sample(model)
    monkeypatch.setitem(torch_engine.LOOK, "cpu", 16)
    assert same(sample(model, rows=3), expected)
    assert same(sample(model), expected)
