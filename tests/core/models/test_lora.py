"""Adapters over one set of frozen weights: equal to the starting model, alone trained and kept."""

from __future__ import annotations

import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    Phi3Config,
    Qwen3Config,
)

from denserl_cli.core.data.batches import collate_sequences
from denserl_cli.core.engine.base import step
from denserl_cli.core.engine.torch_engine import TorchEngine
from denserl_cli.core.errors import DenserlError, Interrupted
from denserl_cli.core.models import lora as adapters
from denserl_cli.core.models.causal_lm import load_causal_lm, response_logprobs
from denserl_cli.core.models.device import autocast
from denserl_cli.core.models.scalar_head import token_values
from denserl_cli.core.observer import Observer
from denserl_cli.core.recipe import Recipe
from denserl_cli.core.recipe.schema import LoraConfig, ModelConfig, OptimizerConfig
from denserl_cli.core.runs.folder import RunFolder
from denserl_cli.core.sandbox.files import with_sandbox_files
from denserl_cli.core.stages import train_ppo as stage
from denserl_cli.core.stages.export import export
from denserl_cli.core.stages.run import run_stage
from tests import tiny
from tests.fakes import RecordingObserver

BATCH = collate_sequences([[3, 4], [5, 6, 7]], [[8, 9, 10, 11], [12, 13]], 0)
LORA = LoraConfig(rank=4, alpha=8.0)
FILE = "adapter_model.safetensors"
HEAD = "score.modules_to_save.default.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny.causal_lm().save_pretrained(path)
    return path


def recipe_of(folder: Path, lora: LoraConfig | None = LORA, **model: Any) -> Recipe:
    return Recipe(name="r", model=ModelConfig(path=str(folder), **model), lora=lora)


def scores(model: Any, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    with autocast(BATCH.input_ids.device, dtype), torch.no_grad():
        logprobs, entropy = response_logprobs(model, BATCH)
    assert entropy is not None
    return logprobs, entropy


def values(model: Any) -> Tensor:
    with torch.no_grad():
        return token_values(model, BATCH)


def equal(left: tuple[Tensor, ...], right: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(*pair) for pair in zip(left, right, strict=True))


def trained(model: Any, steps: int = 3, dtype: torch.dtype = torch.float32) -> TorchEngine:
    """Some steps on whatever the model gives: values if it has a head, else log-probabilities."""
    engine = TorchEngine(
        model,
        learning_rate=0.02,
        settings=OptimizerConfig(warmup_ratio=0.0),
        total_steps=steps,
        compute_dtype=dtype,
    )
    for _ in range(steps):
        given = token_values if hasattr(model, "score") else log_of
        engine.backward(engine(given, BATCH).square().mean())
        step(engine)
    model.eval()
    return engine


def log_of(model: Any, batch: Any) -> Tensor:
    return response_logprobs(model, batch, with_entropy=False).logprobs


def stored(*models: nn.Module) -> int:
    """Numbers in the distinct parameters of some models together."""
    return sum({p.data_ptr(): p.numel() for m in models for p in m.parameters()}.values())


# one body


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_off_is_the_starting_model_to_the_bit_before_and_after_training(
    folder: Path, dtype: str
):
    recipe, compute = recipe_of(folder, dtype=dtype), getattr(torch, dtype)
    untouched = scores(load_causal_lm(recipe.model, trained=False), compute)
    reference = adapters.load_reference(recipe)
    policy = adapters.new_policy(recipe, reference)
    critic = adapters.new_scalar_model(recipe, reference)
    assert equal(scores(policy.eval(), compute), untouched)
    before = values(critic.eval())
    trained(critic.train(), dtype=compute)
    assert equal(scores(policy, compute), untouched)
    trained(policy.train(), dtype=compute)
    assert equal(scores(reference, compute), untouched)
    assert not equal(scores(policy, compute), untouched)
    assert not torch.equal(values(critic), before)


def test_an_error_in_a_pass_leaves_nothing_switched(folder: Path, monkeypatch):
    recipe = recipe_of(folder)
    reference = adapters.load_reference(recipe)
    policy = adapters.new_policy(recipe, reference)
    trained(policy)
    expected = scores(reference), scores(policy)
    for model in (reference, policy):
        with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
            patch.setattr(model.model.layers[1], "forward", lambda *_, **__: 1 / 0)
            scores(model)
        assert equal(scores(reference), expected[0]) and equal(scores(policy), expected[1])


def test_all_models_of_ppo_hold_one_body(folder: Path, tmp_path: Path):
    recipe = recipe_of(folder)
    adapters.new_scalar_model(recipe, None).save_pretrained(tmp_path)
    reference = adapters.load_reference(recipe)
    models = [
        adapters.new_policy(recipe, reference),
        adapters.new_scalar_model(recipe, reference),
        adapters.saved_scalar_model(recipe, str(tmp_path), reference=reference),
    ]
    whole = stored(tiny.causal_lm())
    assert stored(reference) == whole
    # rank * (in + out) of 4 square projections and of 16-32, 16-32 and 32-16, in each of 2 layers
    lora = 2 * 4 * (4 * (16 + 16) + 3 * (16 + 32))
    head = 2 * 16  # and the one it was drawn from, which peft keeps beside it
    assert stored(reference, *models) == whole + 3 * lora + 2 * head


def test_gradients_reach_adapters_and_head_alone_and_all_that_learns_is_float32(folder: Path):
    recipe = recipe_of(folder, dtype="bfloat16")
    reference = adapters.load_reference(recipe)
    for make in (adapters.new_policy, adapters.new_scalar_model):
        model = make(recipe, reference)
        engine = trained(model, steps=1, dtype=torch.bfloat16)
        for layer in (m for m in model.modules() if hasattr(m, "lora_B")):
            assert layer.lora_B["default"].weight.abs().max() > 0  # drawn as 0, so it has learnt
        names = {name for name, p in model.named_parameters() if p.requires_grad}
        assert all(".lora_" in name or name == HEAD for name in names)
        assert (HEAD in names) == hasattr(model, "score")
        assert {p.dtype for p in engine.parameters} == {torch.float32}
        frozen = {
            p.dtype for n, p in model.named_parameters() if n not in names and "score" not in n
        }
        assert frozen == {torch.bfloat16}
    assert all(p.grad is None and not p.requires_grad for p in reference.parameters())
    assert {p.dtype for p in reference.parameters()} == {torch.bfloat16}


def test_gradient_checkpointing_changes_nothing(folder: Path):
    found = []
    for on in (True, False):
        recipe = recipe_of(folder, gradient_checkpointing=on)
        torch.manual_seed(0)
        model = adapters.new_policy(recipe, adapters.load_reference(recipe))
        assert model.is_activation_checkpointing is on
        found.append([p.detach() for p in trained(model).parameters])
    torch.testing.assert_close(*found)


def test_all_weights_are_trained_without_the_block(folder: Path):
    recipe = recipe_of(folder, lora=None)
    reference = adapters.load_reference(recipe)
    policy, critic = (
        make(recipe, reference) for make in (adapters.new_policy, adapters.new_scalar_model)
    )
    assert all(p.requires_grad for model in (policy, critic) for p in model.parameters())
    body = stored(reference.base_model)
    assert stored(reference, policy, critic) == 2 * stored(reference) + body + 16


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=20, n_positions=64),
        Qwen3Config(
            hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=8, vocab_size=20, tie_word_embeddings=True,
        ),
        Phi3Config(
            hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, vocab_size=20,
        ),
    ],
    ids=lambda config: config.model_type,
)  # fmt: skip
def test_other_architectures_too(config: Any, tmp_path: Path):
    """GPT-2: transposed layers; Qwen3: the head is the embedding; Phi-3: fused projections."""
    config.initializer_range = 0.3
    config.pad_token_id = config.bos_token_id = config.eos_token_id = 0
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "start")
    recipe = recipe_of(tmp_path / "start")
    reference = adapters.load_reference(recipe)
    untouched = scores(reference)
    for make, load, measure in (
        (adapters.new_policy, adapters.load_policy, scores),
        (adapters.new_scalar_model, adapters.saved_scalar_model, values),
    ):
        model = make(recipe, reference)
        trained(model)
        model.save_pretrained(tmp_path / make.__name__)
        again = load(recipe, str(tmp_path / make.__name__))
        torch.testing.assert_close(measure(again), measure(model), rtol=0, atol=0)
        scalar = measure is values
        merged = adapters.merged(recipe, tmp_path / make.__name__, scalar=scalar).eval()
        torch.testing.assert_close(measure(merged), measure(model), rtol=1e-5, atol=1e-5)
    assert equal(scores(reference), untouched)


# what is adapted


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (("q_proj", "v_proj"), {"q_proj", "v_proj"}),
        (("mlp.down_proj",), {"down_proj"}),
        ((), {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
    ],
)
def test_the_targets_are_adapted_and_no_other(
    folder: Path, targets: tuple[str, ...], expected: set[str]
):
    recipe = recipe_of(folder, lora=replace(LORA, targets=targets))
    policy = adapters.new_policy(recipe, adapters.load_reference(recipe))
    adapted = [name for name, m in policy.named_modules() if hasattr(m, "lora_A")]
    assert {name.rpartition(".")[2] for name in adapted} == expected
    assert len(adapted) == 2 * len(expected)


def test_one_layer_may_be_named_in_full(folder: Path):
    recipe = recipe_of(folder, lora=replace(LORA, targets=("layers.1.self_attn.q_proj",)))
    policy = adapters.new_policy(recipe, adapters.load_reference(recipe))
    adapted = [name for name, m in policy.named_modules() if hasattr(m, "lora_A")]
    assert adapted == ["model.layers.1.self_attn.q_proj"]


@pytest.mark.parametrize("target", ["query", "proj", "lm_head", "embed_tokens", "score"])
def test_a_target_that_is_no_layer_of_the_body_is_refused(folder: Path, target: str):
    recipe = recipe_of(folder, lora=replace(LORA, targets=("q_proj", target)))
    with pytest.raises(DenserlError, match=f"no linear layer {target}$") as caught:
        adapters.new_scalar_model(recipe, None)
    assert caught.value.hint == (
        "its linear layers are: down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    )


# kept and loaded


@pytest.fixture
def saved(folder: Path, tmp_path: Path) -> Path:
    """A folder of a trained reward model's adapters."""
    model = adapters.new_scalar_model(recipe_of(folder), None)
    trained(model)
    model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def test_a_folder_holds_the_adapters_and_the_head_alone(folder: Path, saved: Path):
    weights = load_file(saved / "adapter_model.safetensors")
    assert all(".lora_" in name or name.endswith("score.weight") for name in weights)
    assert sum("score" in name for name in weights) == 1
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert not (saved / "model.safetensors").exists()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loaded_adapters_are_float32_frozen_and_those_that_were_saved(
    folder: Path, saved: Path, dtype: str
):
    model = adapters.saved_scalar_model(recipe_of(folder, dtype=dtype), str(saved))
    weights = load_file(saved / "adapter_model.safetensors")
    found = {
        f"base_model.model.{name.replace('.default', '').replace('.modules_to_save', '')}": p
        for name, p in model.named_parameters()
        if ".lora_" in name or name == HEAD
    }
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weights[name]) for name in weights)
    assert not any(p.requires_grad for p in model.parameters()) and not model.training


@pytest.mark.parametrize("lora", [LORA, None])
@pytest.mark.parametrize("adapted", [True, False])
def test_a_critic_starts_from_any_reward_model_and_learns_in_the_recipes_way(
    folder: Path, saved: Path, tmp_path: Path, lora: LoraConfig | None, adapted: bool
):
    if not adapted:
        whole = tmp_path / "whole"
        adapters.merged(recipe_of(folder), saved, scalar=True).save_pretrained(whole)
    recipe = recipe_of(folder, lora=lora)
    path = str(saved if adapted else tmp_path / "whole")
    frozen = adapters.saved_scalar_model(recipe, path)
    critic = adapters.saved_scalar_model(recipe, path, trained=True)
    assert critic.training and critic.is_activation_checkpointing
    torch.testing.assert_close(values(critic.eval()), values(frozen), rtol=1e-5, atol=1e-5)
    learns = {name for name, p in critic.named_parameters() if p.requires_grad}
    if lora is None:
        assert len(learns) == len(list(critic.parameters()))
    else:
        assert HEAD in learns and all(".lora_" in n for n in learns - {HEAD})
    trained(critic.train())
    assert not torch.equal(values(critic), values(frozen))


def test_an_engines_state_is_what_is_trained_and_restores_to_the_bit(folder: Path):
    recipe = recipe_of(folder)
    reference = adapters.load_reference(recipe)
    engine = trained(adapters.new_scalar_model(recipe, reference))
    state = engine.state()
    assert all(".lora_" in name or name == HEAD for name in state["model"])
    other = adapters.new_scalar_model(recipe, reference).eval()
    assert not torch.equal(values(other), values(engine.model))
    restored = trained(other, steps=0)
    restored.restore(state)
    assert torch.equal(values(other), values(engine.model))


def shortened(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def without_weights(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()


def without_head(folder: Path) -> None:
    rewritten(folder, lambda weights: {n: w for n, w in weights.items() if "score" not in n})


def without_a_layer(folder: Path) -> None:
    rewritten(folder, lambda weights: {n: w for n, w in weights.items() if "layers.1" not in n})


def with_another_layer(folder: Path) -> None:
    one = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    rewritten(
        folder,
        lambda weights: {**weights, one.replace("layers.0", "layers.7"): weights[one].clone()},
    )


def of_another_width(folder: Path) -> None:
    rewritten(folder, lambda weights: {n: w[:, :-1].contiguous() for n, w in weights.items()})


def with_a_broken_config(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{")


def rewritten(folder: Path, change: Any) -> None:
    file = folder / "adapter_model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})


@pytest.mark.parametrize(
    "spoil",
    [shortened, without_weights, without_head, without_a_layer, with_another_layer,
     of_another_width, with_a_broken_config],
)  # fmt: skip
def test_adapters_that_are_damaged_or_do_not_fit_are_refused(folder: Path, saved: Path, spoil: Any):
    spoil(saved)
    with pytest.raises(DenserlError, match=f"cannot load the adapters {saved}") as caught:
        adapters.saved_scalar_model(recipe_of(folder), str(saved))
    assert "\n" not in caught.value.message and caught.value.hint


def test_another_body_is_refused(saved: Path, tmp_path: Path):
    tiny.causal_lm(hidden=32).save_pretrained(tmp_path / "wider")
    with pytest.raises(DenserlError, match="cannot load the adapters"):
        adapters.saved_scalar_model(recipe_of(tmp_path / "wider"), str(saved))


def test_policies_load_whole_adapted_and_at_the_start(folder: Path, tmp_path: Path):
    recipe = recipe_of(folder)
    reference = adapters.load_reference(recipe)
    policy = adapters.new_policy(recipe, reference)
    trained(policy)
    policy.save_pretrained(tmp_path / "adapted")
    adapters.merged(recipe, tmp_path / "adapted", scalar=False).save_pretrained(tmp_path / "whole")
    alone = adapters.load_policy(recipe, tmp_path / "adapted")
    over = adapters.load_policy(recipe, tmp_path / "adapted", reference=reference)
    assert equal(scores(alone), scores(policy)) and equal(scores(over), scores(policy))
    assert stored(reference, over) < 2 * stored(reference)
    whole = adapters.load_policy(recipe, tmp_path / "whole")
    for left, right in zip(scores(whole), scores(policy), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)
    start = adapters.load_policy(recipe, str(folder), reference=reference)
    assert equal(scores(start), scores(reference))


# 4 bits


def test_four_bits_are_refused_without_a_gpu(folder: Path, monkeypatch):
    recipe = recipe_of(folder, lora=replace(LORA, quantize=True))

    def load(*_: Any, **__: Any) -> Any:
        raise AssertionError("something was loaded")

    monkeypatch.setattr(adapters, "load_causal_lm", load)
    monkeypatch.setattr(adapters, "device", lambda: torch.device("cpu"))
    with pytest.raises(DenserlError, match=r"needs bitsandbytes on a CUDA GPU: .* cpu") as caught:
        adapters.load_reference(recipe)
    assert "lora.quantize=false" in (caught.value.hint or "")


def test_four_bits_are_refused_without_bitsandbytes(folder: Path, monkeypatch):
    recipe = recipe_of(folder, lora=replace(LORA, quantize=True))
    monkeypatch.setattr(adapters, "device", lambda: torch.device("cuda"))
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes.functional", None)
    with pytest.raises(DenserlError, match="needs bitsandbytes on a CUDA GPU") as caught:
        adapters.quantization(recipe)
    assert "denserl[qlora]" in (caught.value.hint or "")


def test_other_recipes_hold_their_weights_as_they_are(folder: Path):
    assert adapters.quantization(recipe_of(folder)) is None
    assert adapters.quantization(recipe_of(folder, lora=None)) is None


# the stages

SETTINGS = (
    "lora={rank: 4, alpha: 8.0}",
    "reward_model.learning_rate=1e-2",
    "reward_model.save_every=2",
    "ppo.actor_learning_rate=1e-2",
    "ppo.critic_learning_rate=1e-2",
)
IDS = torch.tensor([[3, 9, 10, 11, 4, 20], [0, 0, 3, 9, 4, 20]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])


def run(stage: str, folder: Path, *settings: str, mode: Any = "start", at_step: Any = None) -> None:
    observer = Observer() if at_step is None else RecordingObserver(at_step)
    run_stage(stage, tiny.recipe(*SETTINGS, *settings), folder, mode, observer)


@pytest.fixture(scope="module")
def _finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lora") / "run"
    for name in ("train-rm", "fit-function", "train-ppo"):
        run(name, folder)
    return folder


@pytest.fixture
def finished(_finished: Path, tmp_path: Path) -> Path:
    """A run of all stages with adapters, in another folder than the one it was trained in."""
    return Path(shutil.copytree(_finished, tmp_path / "moved"))


def weights(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def opened(folder: Path) -> Recipe:
    recipe = tiny.recipe(*SETTINGS)
    return with_sandbox_files(recipe, RunFolder(folder, recipe), Observer())


def test_the_stages_leave_adapters_that_have_learnt(finished: Path):
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    kl = [line["kl"] for line in lines if line["stage"] == "train-ppo" and "kl" in line]
    assert kl[0] == 0 and max(kl) > 0.01  # until it learns, the policy is the reference to the bit
    for part in ("reward_model", "policy", "policy_best"):
        assert adapters.is_adapters(finished / part)
        assert not (finished / part / "model.safetensors").exists()
    assert any(w.abs().max() > 0 for n, w in load_file(finished / "policy" / FILE).items()
               if "lora_B" in n)  # fmt: skip


@pytest.mark.parametrize("part", ["policy", "policy-best", "reward-model"])
def test_an_export_is_a_plain_model_with_the_same_outputs(
    part: Any, finished: Path, tmp_path: Path
):
    recipe, source = tiny.recipe(*SETTINGS), finished / part.replace("-", "_")
    shutil.rmtree(finished / "export", ignore_errors=True)
    export(part, recipe, RunFolder(finished, recipe), tmp_path / "out", replace=False)
    files = {file.name for file in (tmp_path / "out").iterdir()}
    assert "model.safetensors" in files and not files & set(adapters.FILES)
    names = load_file(tmp_path / "out" / "model.safetensors").keys()
    assert not any("lora" in name or "modules_to_save" in name for name in names)
    if part == "reward-model":
        kind, load = AutoModelForSequenceClassification, adapters.saved_scalar_model
        assert {"denserl.json", "normalizer.json"} <= files
    else:
        kind, load = AutoModelForCausalLM, adapters.load_policy
    plain, loading = kind.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    adapted = load(opened(finished), str(source))
    assert type(plain) is type(adapted)
    if part == "reward-model":
        adapted.config.pad_token_id = plain.config.pad_token_id
        assert plain.config.num_labels == 1 and plain.config.pad_token_id is not None
    else:
        assert plain.generation_config.eos_token_id == [5]
    with torch.no_grad():
        expected = adapted(input_ids=IDS, attention_mask=MASK).logits
        found = plain(input_ids=IDS, attention_mask=MASK).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_an_exported_reward_model_serves_a_run_that_trains_whole_models(
    finished: Path, tmp_path: Path
):
    """And the adapters themselves do: what is trained is a choice of each stage."""
    settings = ("lora=null", "ppo.iterations=1", "data.eval_prompts=0")
    for init in ("policy", "reward_model"):
        folder = Path(shutil.copytree(finished, tmp_path / init))
        run("train-ppo", folder, *settings, f"ppo.critic_init={init}", mode="fresh")
        assert (folder / "policy" / "model.safetensors").exists()


@pytest.mark.parametrize("granularity", ["token", "bandit"])
def test_other_granularities_need_the_body_but_no_reference(granularity: str, finished: Path):
    cut = (f"segmentation.granularity={granularity}", "segmentation.cutoff=null")
    run("train-rm", finished, *cut, mode="fresh")
    run("fit-function", finished, *cut)
    assert adapters.is_adapters(finished / "reward_model")


def test_other_adapters_are_another_run(finished: Path):
    with pytest.raises(DenserlError, match=r"lora\.rank was 4, is 8"):
        run("train-rm", finished, "lora.rank=8")
    with pytest.raises(DenserlError, match=r"lora\.rank was 4, is null"):
        run("train-ppo", finished, "lora=null")


def test_a_reward_model_resumes_to_the_same_bytes(finished: Path):
    expected = weights(finished / "reward_model")

    def stop(done: int) -> None:
        if done == 4:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted, match="stopped after step 4"):
        run("train-rm", finished, mode="fresh", at_step=stop)
    run("train-rm", finished, mode="resume")
    assert weights(finished / "reward_model") == expected


def test_a_policy_resumes_to_the_same_bytes(finished: Path, monkeypatch):
    calls, original = [], stage.Updater.update

    def update(*words: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return original(*words, **options)

    expected = weights(finished / "policy"), weights(finished / "policy_best")
    with monkeypatch.context() as patch, pytest.raises(Interrupted, match="after iteration 3"):
        patch.setattr(stage.Updater, "update", update)
        run("train-ppo", finished, mode="fresh")
    run("train-ppo", finished, mode="resume")
    assert (weights(finished / "policy"), weights(finished / "policy_best")) == expected


def test_four_bits_are_refused_before_anything_is_made(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(adapters, "device", lambda: torch.device("cpu"))
    with pytest.raises(DenserlError, match="needs bitsandbytes on a CUDA GPU"):
        run("train-rm", tmp_path / "run", "lora.quantize=true")
    assert not (tmp_path / "run").exists()
