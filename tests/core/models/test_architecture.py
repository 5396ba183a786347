"""What configurations say: kinds of models, noise, positions, caches, text parts, kernels."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    DbrxConfig,
    FalconConfig,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    LlamaConfig,
    MiniMaxConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    PhimoeConfig,
    RwkvConfig,
    T5Config,
    WhisperConfig,
    XLNetConfig,
)

from denserl_cli.core.data.batches import collate_sequences
from denserl_cli.core.errors import DenserlError
from denserl_cli.core.models.architecture import (
    causal_class,
    check_local_model,
    check_scalar_class,
    check_starting_model,
    positions_limit,
    read_config,
    switch_off_noise,
)
from denserl_cli.core.models.attention import attention_kernel, sampling_attention
from denserl_cli.core.models.causal_lm import hidden_states, load_causal_lm
from denserl_cli.core.models.scalar_head import load_scalar_model
from denserl_cli.core.observer import Observer
from denserl_cli.core.recipe import load_recipe
from denserl_cli.core.recipe.schema import ModelConfig, Recipe
from tests import tiny

SHAPE = {
    "vocab_size": 20,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}


def recipe_for(folder: Path, **lengths: int) -> Recipe:
    """A recipe that starts from a folder, with some lengths changed."""
    made = tiny.recipe()
    data, ppo, rollout = (
        {name: lengths[name] for name in (key,) if name in lengths}
        for key in ("max_length", "max_prompt_length", "max_new_tokens")
    )
    return replace(
        made,
        model=ModelConfig(path=str(folder)),
        data=replace(made.data, **data),
        ppo=replace(made.ppo, **ppo, rollout=replace(made.ppo.rollout, **rollout)),
    )


def refused(folder: Path, **lengths: int) -> DenserlError:
    with pytest.raises(DenserlError) as caught:
        check_starting_model(recipe_for(folder, **lengths))
    assert caught.value.hint and "\n" not in caught.value.message
    return caught.value


# noise


def test_noise_of_every_name_is_off_in_nested_configurations_too():
    noisy = [
        MixtralConfig(router_jitter_noise=0.1, attention_dropout=0.1),
        PhimoeConfig(router_jitter_noise=0.01, input_jitter_noise=0.02, hidden_dropout=0.1),
        GPT2Config(attn_pdrop=0.1, resid_pdrop=0.1, embd_pdrop=0.1, summary_first_dropout=0.1),
        OPTConfig(dropout=0.1, layerdrop=0.3),
        FalconConfig(hidden_dropout=0.1),
        DbrxConfig(attn_config={"attn_pdrop": 0.1}, ffn_config={"moe_jitter_eps": 0.2}),
        Gemma3Config(text_config={"attention_dropout": 0.1}),
    ]
    for config in noisy:
        switch_off_noise(config)
        left = {
            name: value
            for name, value in flat(config.to_dict())
            if isinstance(value, float) and value and ("drop" in name or "jitter" in name)
        }
        assert not left, type(config)


def flat(values: dict):
    for name, value in values.items():
        if isinstance(value, dict):
            yield from flat(value)
        else:
            yield name, value


# kinds of models


def test_encoders_and_decoders_are_refused_in_one_line(tmp_path: Path):
    for config in (T5Config(), WhisperConfig()):
        config.save_pretrained(tmp_path)
        assert "is not a causal language model" in refused(tmp_path).message


@pytest.mark.parametrize("config", [RwkvConfig(), MiniMaxConfig(**SHAPE), XLNetConfig()])
def test_a_cache_of_another_kind_is_refused(tmp_path: Path, config):
    config.save_pretrained(tmp_path)
    error = refused(tmp_path)
    assert f"a {config.model_type} model keeps what it has read in a cache of its own" in (
        error.message
    )


def test_a_kind_without_a_classifier_is_refused_before_training(tmp_path: Path):
    GraniteConfig(**SHAPE).save_pretrained(tmp_path)
    with pytest.raises(DenserlError, match="no sequence classifier of the kind granite"):
        check_scalar_class(ModelConfig(path=str(tmp_path)))
    LlamaConfig(**SHAPE).save_pretrained(tmp_path)
    check_scalar_class(ModelConfig(path=str(tmp_path)))


def test_packed_weights_are_refused(tmp_path: Path):
    tiny.causal_lm().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    packed = {"quantization_config": {"quant_method": "awq", "bits": 4}}
    file.write_text(json.dumps({**json.loads(file.read_text()), **packed}))
    error = refused(tmp_path)
    assert "packed by awq" in error.message and "lora.quantize" in error.hint


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("told_by", ["architecture", "score"])
def test_a_reward_model_is_no_language_model(tmp_path: Path, tied: bool, told_by: str):
    config = tiny.config()
    config.tie_word_embeddings, config.num_labels = tied, 1
    from transformers import LlamaForSequenceClassification

    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    if told_by == "score":
        file = tmp_path / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "architectures": None}))
    assert "is a reward model" in refused(tmp_path).message
    with pytest.raises(DenserlError, match="its head would be lost"):
        load_causal_lm(ModelConfig(path=str(tmp_path)), trained=False, what="policy")


# positions


LONG = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [8.0] * 4}


def long_rope(**more) -> Phi3Config:
    return Phi3Config(
        **SHAPE,
        pad_token_id=0,
        max_position_embeddings=256,
        original_max_position_embeddings=32,
        rope_parameters={**LONG, "rope_theta": 10000.0, "original_max_position_embeddings": 32},
        **more,
    )


def dynamic(**more) -> LlamaConfig:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    return LlamaConfig(**SHAPE, max_position_embeddings=32, rope_parameters=rope, **more)


@pytest.mark.parametrize("config", [long_rope(), dynamic(), GPT2Config(n_positions=32)])
def test_lengths_beyond_a_border_of_positions_are_refused(tmp_path: Path, config):
    config.save_pretrained(tmp_path)
    fits = {"max_length": 32, "max_prompt_length": 16, "max_new_tokens": 16}
    check_starting_model(recipe_for(tmp_path, **fits))
    error = refused(tmp_path, **{**fits, "max_length": 33})
    assert "at most 32 tokens" in error.message and error.hint == "lower data.max_length"
    error = refused(tmp_path, **{**fits, "max_new_tokens": 17})
    assert error.hint == "lower ppo.max_prompt_length + ppo.rollout.max_new_tokens"


@pytest.mark.parametrize("config", [long_rope(), dynamic()])
def test_no_batch_crosses_the_border_of_positions(tmp_path: Path, config):
    """Whatever stage makes it: the rows of a batch beyond the border change each other."""
    torch.manual_seed(0)
    causal_class(config, "")(config).save_pretrained(tmp_path)
    model = load_causal_lm(ModelConfig(path=str(tmp_path)), trained=False)
    hidden_states(model, collate_sequences([[1] * 30], [[2, 3]], 0))
    with pytest.raises(DenserlError, match="at most 32 tokens"):
        hidden_states(model, collate_sequences([[1] * 30], [[2, 3, 4]], 0))


def test_plain_rotary_positions_have_no_limit_but_a_notice(tmp_path: Path):
    LlamaConfig(**SHAPE, max_position_embeddings=32).save_pretrained(tmp_path)
    assert positions_limit(AutoConfig.from_pretrained(tmp_path)) is None
    said: list[str] = []

    class Listener(Observer):
        def notice(self, text: str) -> None:
            said.append(text)

    fits = {"max_length": 32, "max_prompt_length": 16, "max_new_tokens": 16}
    check_starting_model(recipe_for(tmp_path, **fits), Listener())
    assert not said
    check_starting_model(recipe_for(tmp_path, **{**fits, "max_length": 40}), Listener())
    assert len(said) == 1 and "data.max_length 40" in said[0] and "up to 32 tokens" in said[0]


# text parts


@pytest.mark.parametrize("named", ["language_model.model.", "model.language_model."])
def test_of_a_model_that_sees_the_text_part_is_taken(tmp_path: Path, named: str):
    whole = vision_model(tmp_path / "whole", named)
    folder = ModelConfig(path=str(tmp_path / "whole"), gradient_checkpointing=False)
    check_starting_model(recipe_for(tmp_path / "whole"))
    ids = torch.arange(1, 9)[None]
    expected = whole.model.language_model(input_ids=ids).last_hidden_state
    policy = load_causal_lm(folder, trained=True)
    torch.testing.assert_close(policy(input_ids=ids).logits, whole(input_ids=ids).logits)
    reward = load_scalar_model(folder, fresh_head=True, trained=True)
    for name, model in {"policy": policy, "reward": reward}.items():
        torch.testing.assert_close(model.base_model(input_ids=ids).last_hidden_state, expected)
        model.save_pretrained(tmp_path / name)  # under its own names, as a text model
        assert json.loads((tmp_path / name / "config.json").read_text())["model_type"] == (
            "gemma3_text"
        )
    again = load_causal_lm(ModelConfig(path=str(tmp_path / "policy")), trained=False)
    torch.testing.assert_close(again.base_model(input_ids=ids).last_hidden_state, expected)
    scored = ModelConfig(path=str(tmp_path / "reward"))
    again = load_scalar_model(scored, fresh_head=False, trained=False)
    assert torch.equal(again.score.weight, reward.score.weight)


def vision_model(folder: Path, named: str) -> Gemma3ForConditionalGeneration:
    """A Gemma 3 that sees, saved with the names of an older or a newer release."""
    from safetensors.torch import load_file, save_file

    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    text = {**SHAPE, "layer_types": ["full_attention"] * 2, "initializer_range": 0.3}
    text["tie_word_embeddings"] = False  # the whole says True, and has no head of its own
    torch.manual_seed(0)
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    model = Gemma3ForConditionalGeneration(config).eval()
    model.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    renamed = {
        name.replace("language_model.model.", named): weight for name, weight in weights.items()
    }
    save_file(renamed, folder / "model.safetensors", {"format": "pt"})
    return model


# kernels


def test_a_model_without_sdpa_gets_eager_or_a_hint(tmp_path: Path):
    Gemma2ForCausalLM(Gemma2Config(**SHAPE, final_logit_softcapping=None)).save_pretrained(tmp_path)
    model = load_causal_lm(ModelConfig(path=str(tmp_path)), trained=False)
    assert model.config._attn_implementation == "eager"
    with pytest.raises(DenserlError, match=r"model\.attention is sdpa") as caught:
        load_causal_lm(ModelConfig(path=str(tmp_path), attention="sdpa"), trained=False)
    assert "model.attention=auto" in caught.value.hint


def test_flash_attention_that_is_not_installed_is_said_at_once(monkeypatch):
    monkeypatch.setattr("transformers.utils.is_flash_attn_2_available", lambda: False)
    monkeypatch.setattr("transformers.utils.import_utils.is_kernels_available", lambda *_: False)
    with pytest.raises(DenserlError, match="not installed here"):
        attention_kernel(ModelConfig(attention="flash_attention_2"))


def test_auto_is_flash_attention_where_it_can_compute(monkeypatch):
    monkeypatch.setattr("transformers.utils.is_flash_attn_2_available", lambda: True)
    half, whole = ModelConfig(dtype="bfloat16"), ModelConfig(dtype="float32")
    assert attention_kernel(half) == "flash_attention_2"
    assert attention_kernel(whole) == "sdpa"
    assert attention_kernel(half, GPT2LMHeadModel) == "flash_attention_2"
    assert attention_kernel(half, type("Old", (), {})) == "eager"


def test_a_model_samples_with_sdpa_and_trains_with_flash_attention():
    model = tiny.causal_lm()
    ids = torch.arange(8)[None]
    expected = model(input_ids=ids).logits
    model.config._attn_implementation = "flash_attention_2"
    with sampling_attention(model):
        assert torch.equal(model(input_ids=ids).logits, expected)
        assert model.model.layers[0].self_attn.config._attn_implementation == "sdpa"
    assert model.model.layers[0].self_attn.config._attn_implementation == "flash_attention_2"
    model.config._attn_implementation = "eager"
    with sampling_attention(model):  # chosen by the recipe: it stays
        assert model.config._attn_implementation == "eager"


def test_a_configuration_is_read_without_noise(tmp_path: Path):
    MixtralConfig(router_jitter_noise=0.1).save_pretrained(tmp_path)
    assert read_config(str(tmp_path)).router_jitter_noise == 0


def test_a_folders_model_is_checked_before_anything_is_read(tmp_path: Path):
    recipe = load_recipe("sandbox-segment")
    check_local_model(recipe)  # the sandbox's model is made later
    recipe = replace(recipe, sandbox=None, model=replace(recipe.model, path=str(tmp_path)))
    check_local_model(recipe)  # nothing there: the stage says so
    T5Config().save_pretrained(tmp_path)
    with pytest.raises(DenserlError, match="not a causal language model"):
        check_local_model(recipe)
