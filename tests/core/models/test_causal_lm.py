"""Loading models, and one forward pass: what belongs to which token."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    BertConfig,
    BertForMaskedLM,
    CohereConfig,
    CohereForCausalLM,
    LlamaForSequenceClassification,
    PhiConfig,
    PhiForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from denserl_cli.core.chat.loading import load_tokenizer
from denserl_cli.core.data.batches import WIDTH_STEP, SequenceBatch, collate_sequences
from denserl_cli.core.errors import DenserlError
from denserl_cli.core.models.causal_lm import load_causal_lm, response_logprobs
from denserl_cli.core.models.load_checks import refuse_unusual_head
from denserl_cli.core.models.scalar_head import load_scalar_model, token_values
from denserl_cli.core.recipe.schema import ModelConfig
from denserl_cli.core.sandbox.files import SandboxFiles
from tests.tiny import causal_lm, config, scalar_model

PROMPTS = [[3, 4, 5], [6], [7, 8, 9, 10]]
RESPONSES = [[11, 12], [13, 14, 15, 16, 2], [2]]
SHAPE = {
    "vocab_size": 20,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "initializer_range": 0.3,
}


def batch(pad_id: int = 0, rows: tuple[int, ...] = (0, 1, 2)) -> SequenceBatch:
    return collate_sequences([PROMPTS[i] for i in rows], [RESPONSES[i] for i in rows], pad_id)


def alone(model: torch.nn.Module, row: int) -> Tensor:
    """Log-probabilities over the vocabulary after each token of one unpadded sequence."""
    ids = torch.tensor([PROMPTS[row] + RESPONSES[row]])
    with torch.no_grad():
        return model(input_ids=ids).logits[0].float()


# loading


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused_by_name(bad: float, tmp_path: Path):
    model = causal_lm()
    name = "model.layers.0.mlp.up_proj.weight"
    with torch.no_grad():
        dict(model.named_parameters())[name][1, 2] = bad
    model.save_pretrained(tmp_path)
    with pytest.raises(DenserlError, match="NaN or infinite") as caught:
        load_causal_lm(ModelConfig(path=str(tmp_path)), trained=False)
    assert name in caught.value.message and str(tmp_path) in caught.value.message


# likelihood and entropy


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_likelihoods_and_entropies_are_those_of_the_whole_logits(temperature: float):
    model = causal_lm()
    with torch.no_grad():
        found = response_logprobs(model, batch(), temperature=temperature)
        drawn = response_logprobs(model, batch(), temperature=temperature, drawn=True)
    assert found.entropy is not None and drawn.entropy is not None
    assert torch.equal(drawn.logprobs, found.logprobs)
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        logits = alone(model, row)
        tempered = (logits / temperature).log_softmax(1)
        plain = logits.log_softmax(1)
        for j, token in enumerate(response):
            before = len(prompt) + j - 1
            expected = tempered[before, token]
            torch.testing.assert_close(found.logprobs[row, j], expected, atol=2e-5, rtol=1e-5)
            expected = -(tempered[before].exp() * tempered[before]).sum()
            torch.testing.assert_close(drawn.entropy[row, j], expected, atol=2e-5, rtol=1e-5)
        for j in range(len(response) - 1):  # after token j, at temperature 1
            after = plain[len(prompt) + j]
            expected = -(after.exp() * after).sum()
            torch.testing.assert_close(found.entropy[row, j], expected, atol=2e-5, rtol=1e-5)
        assert not found.entropy[row, len(response) - 1 :].any()
        assert not found.logprobs[row, len(response) :].any()


def test_padding_changes_nothing():
    model = causal_lm()
    with torch.no_grad():
        together = response_logprobs(model, batch())
        other_pad = response_logprobs(model, batch(pad_id=2))
        for row in range(3):
            one = response_logprobs(model, batch(rows=(row,)))
            size = len(RESPONSES[row])
            for pair in zip(together, one, strict=True):
                joint, single = (part for part in pair if part is not None)
                torch.testing.assert_close(joint[row, :size], single[0], atol=1e-5, rtol=1e-4)
    for first, second in zip(together, other_pad, strict=True):
        torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("step", [8, 64])
def test_wider_batches_have_the_same_values_and_gradients(step: int, monkeypatch):
    """As on a GPU, where widths are rounded so that shapes recur."""
    shapes, numbers = [], []
    for width in (1, step):
        monkeypatch.setitem(WIDTH_STEP, "cpu", width)
        policy, reward = causal_lm().train(), scalar_model().train()
        found = response_logprobs(policy, batch(), temperature=0.7)
        values = token_values(reward, batch())
        (found.logprobs.sum() + values.square().sum()).backward()
        gradients = [p.grad for model in (policy, reward) for p in model.parameters()]
        numbers.append([*found, values, *(g for g in gradients if g is not None)])
        shapes.append(tuple(batch().input_ids.shape))
    assert shapes == [(3, 6), (3, step)]
    for narrow, wide in zip(*numbers, strict=True):
        torch.testing.assert_close(wide, narrow, atol=1e-5, rtol=1e-4)


def test_without_entropy_none_is_returned():
    found = response_logprobs(causal_lm(), batch(), with_entropy=False)
    assert found.entropy is None and found.logprobs.requires_grad


# token values


@pytest.mark.parametrize("before", [False, True])
def test_values_are_read_at_a_token_or_before_it(before: bool):
    model = scalar_model()
    with torch.no_grad():
        values = token_values(model, batch(), before=before)
        for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
            ids = torch.tensor([prompt + response])
            states = model.model(input_ids=ids).last_hidden_state
            expected = model.score(states)[0, :, 0]
            start = len(prompt) - before
            torch.testing.assert_close(
                values[row, : len(response)], expected[start : start + len(response)]
            )
            assert not values[row, len(response) :].any()


def test_a_reward_model_is_a_plain_sequence_classifier(tmp_path: Path):
    scalar_model().save_pretrained(tmp_path)
    plain = LlamaForSequenceClassification.from_pretrained(tmp_path)
    plain.config.pad_token_id = None
    loaded = load_scalar_model(model_at(tmp_path), fresh_head=False, trained=False)
    values = token_values(loaded, batch())
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        with torch.no_grad():  # transformers scores a sequence at its last token
            expected = plain(input_ids=torch.tensor([prompt + response])).logits[0, 0]
        torch.testing.assert_close(values[row, len(response) - 1], expected)


def test_values_stay_float32_under_autocast():
    model = scalar_model()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        values = token_values(model, batch())
    assert values.dtype == torch.float32
    # not rounded to bfloat16, as the body's states are
    assert (values - values.bfloat16().float()).abs().max() > 0


# loading


def model_at(path: Path, **options: object) -> ModelConfig:
    return ModelConfig(path=str(path), gradient_checkpointing=False, **options)  # type: ignore[arg-type]


def test_frozen_models_have_no_gradients_and_trained_ones_are_float32(slots: SandboxFiles):
    half = model_at(slots.model, dtype="bfloat16")
    for trained in (False, True):
        for model in (
            load_causal_lm(half, trained=trained),
            load_scalar_model(half, fresh_head=True, trained=trained),
        ):
            assert model.training is trained
            parameters = dict(model.named_parameters())
            head = parameters.pop("score.weight", None)
            assert head is None or head.dtype == torch.float32
            assert {p.requires_grad for p in parameters.values()} == {trained}
            kind = torch.float32 if trained else torch.bfloat16
            assert {p.dtype for p in parameters.values()} == {kind}


def test_a_fresh_head_is_small_and_follows_the_seed(tmp_path: Path):
    causal_lm(hidden=512, layers=1).save_pretrained(tmp_path)
    heads = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        heads.append(load_scalar_model(model_at(tmp_path), fresh_head=True, trained=True).score)
    assert torch.equal(heads[0].weight, heads[1].weight)
    assert not torch.equal(heads[0].weight, heads[2].weight)
    for head in heads:
        assert head.bias is None and head.weight.dtype == torch.float32
        assert head.weight.shape == (1, 512)
        assert head.weight.std().item() * 513 == pytest.approx(1, abs=0.1)
        assert head.weight.mean().item() * 513 == pytest.approx(0, abs=0.15)


def test_a_head_of_another_width_is_as_good_as_none(tmp_path: Path):
    shape = config()
    shape.num_labels = 3
    LlamaForSequenceClassification(shape).save_pretrained(tmp_path)
    fresh = load_scalar_model(model_at(tmp_path), fresh_head=True, trained=True)
    assert fresh.score.weight.shape == (1, 16)
    with pytest.raises(DenserlError, match=r"lacks weights .*score\.weight"):
        load_scalar_model(model_at(tmp_path), fresh_head=False, trained=False)


def test_missing_weights_are_never_made_up(tmp_path: Path):
    causal_lm().save_pretrained(tmp_path / "lm")
    with pytest.raises(DenserlError, match=r"lacks weights of the reward model.*score\.weight"):
        load_scalar_model(model_at(tmp_path / "lm"), fresh_head=False, trained=False)
    file = tmp_path / "lm" / "model.safetensors"
    weights = load_file(file)
    save_file({k: w for k, w in weights.items() if k != "lm_head.weight"}, file, {"format": "pt"})
    with pytest.raises(DenserlError, match=r"lacks weights of the starting model.*lm_head\.weight"):
        load_causal_lm(model_at(tmp_path / "lm"), trained=False)
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(DenserlError, match=r"lacks weights .*up_proj"):
        load_causal_lm(model_at(tmp_path / "lm"), trained=False)


def load_either(path: Path) -> list[str]:
    """The messages of what refuses to load a folder as policy and as reward model."""
    messages = []
    for load in (
        lambda: load_causal_lm(model_at(path), trained=False),
        lambda: load_scalar_model(model_at(path), fresh_head=True, trained=False),
    ):
        with pytest.raises(DenserlError) as caught:
            load()
        assert caught.value.hint
        messages.append(caught.value.message)
    return messages


@pytest.mark.parametrize("spread", [0.3, 0.02])
def test_a_model_that_reads_in_both_directions_is_refused(tmp_path: Path, spread: float):
    shape = BertConfig(**{**SHAPE, "num_hidden_layers": 2, "initializer_range": spread})
    BertForMaskedLM(shape).save_pretrained(tmp_path)
    for message in load_either(tmp_path):
        assert "bert model that reads in both directions is not a causal" in message


def test_an_encoder_decoder_is_refused(tmp_path: Path):
    shape = T5Config(vocab_size=20, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(shape).save_pretrained(tmp_path)
    for message in load_either(tmp_path):
        assert "a t5 model is not a causal language model" in message


def test_what_cannot_be_read_is_one_error(tmp_path: Path, slots: SandboxFiles):
    for name in ("torn", "unread", "empty"):
        shutil.copytree(slots.model, tmp_path / name)
    file = tmp_path / "torn" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:500])
    (tmp_path / "unread" / "config.json").write_text("{")
    (tmp_path / "empty" / "model.safetensors").unlink()
    for name in ("torn", "unread", "empty", "gone"):
        for message in load_either(tmp_path / name):
            assert message.startswith("cannot load the ") and name in message
            assert "\n" not in message
    with pytest.raises(DenserlError, match="cannot load the tokenizer"):
        load_tokenizer(model_at(tmp_path / "gone"))


def test_heads_that_are_a_plain_product_are_accepted():
    model = causal_lm().train()
    refuse_unusual_head(model, "here")
    assert model.training


def test_heads_with_a_bias_a_scale_or_a_cap_are_refused():
    torch.manual_seed(0)
    biased = PhiForCausalLM(PhiConfig(**SHAPE))
    torch.nn.init.normal_(biased.lm_head.bias)
    scaled = CohereForCausalLM(CohereConfig(**SHAPE, logit_scale=0.0625))
    capped = causal_lm()
    capped.config.final_logit_softcapping = 30.0
    for model in (biased, scaled, capped):
        with pytest.raises(DenserlError, match="here: the language-model head adds a bias"):
            refuse_unusual_head(model, "here")
