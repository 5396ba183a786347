"""Memory by hand for two known models, and plans that keep their word."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from denserl_cli.core.errors import DenserlError
from denserl_cli.core.planning import feasibility as planning
from denserl_cli.core.planning import host_memory
from denserl_cli.core.planning import memory_terms as memory
from denserl_cli.core.planning import stage_memory as phases
from denserl_cli.core.planning.memory_terms import GIB, Setting
from denserl_cli.core.planning.model_shape import (
    ModelShape,
    config_shape,
    configured_shape,
    recipe_shape,
    recorded_shape,
)
from denserl_cli.core.recipe import Recipe, load_recipe
from denserl_cli.core.recipe.schema import LoraConfig, RecordedConfig
from denserl_cli.core.recipe.stages import STAGES, TRAINING, StageName
from tests import tiny

PHI3 = RecordedConfig(
    gpus=8,
    parameters=3_821_079_552,
    hidden_size=3072,
    intermediate_size=8192,
    layers=32,
    heads=32,
    key_value_heads=32,
    vocabulary=32064,
)
LLAMA3 = RecordedConfig(
    gpus=8,
    parameters=8_030_261_248,
    hidden_size=4096,
    intermediate_size=14336,
    layers=32,
    heads=32,
    key_value_heads=8,
    vocabulary=128_256,
    preference_pairs=700_000,
    prompts=60_917,
)
QWEN3 = RecordedConfig(
    parameters=596_049_920,
    hidden_size=1024,
    intermediate_size=3072,
    layers=28,
    heads=16,
    key_value_heads=8,
    vocabulary=151_936,
)


def shape(recorded: RecordedConfig) -> ModelShape:
    found = recorded_shape(recorded)
    assert found is not None
    return found


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """Llama-3-8B as published, on data of a known size."""
    return load_recipe(write(tmp_path / "big.yaml"))


def write(file: Path) -> str:
    facts = {k: v for k, v in vars(LLAMA3).items() if v is not None}
    file.write_text(
        "model: {path: org/llama}\nsegmentation: {cutoff: 2}\n"
        "data: {preferences: org/pairs, prompts: org/prompts}\n"
        "reward_model: {micro_batch_size: 4}\n"
        "ppo: {micro_batch_size: 2, rollout: {micro_batch_size: 4}}\n"
        f"recorded: {facts}\n".replace("True", "true").replace("False", "false")
    )
    return str(file)


def test_what_is_not_recorded_follows_from_the_number_of_weights():
    assert (shape(PHI3).queries, shape(PHI3).keys, shape(PHI3).tied) == (3072, 3072, False)
    assert (shape(LLAMA3).queries, shape(LLAMA3).keys, shape(LLAMA3).tied) == (4096, 1024, False)
    qwen = shape(QWEN3)  # a head of 128, though 1024 / 16 is 64
    assert (qwen.queries, qwen.keys, qwen.tied) == (2048, 1024, True)
    assert shape(LLAMA3).body == 8_030_261_248 - 128_256 * 4096
    assert qwen.body == 596_049_920
    assert recorded_shape(replace(PHI3, layers=None)) is None


@pytest.mark.parametrize("recorded", [PHI3, LLAMA3])
def test_states_of_a_policy_on_eight_gpus(recorded: RecordedConfig):
    weights = recorded.parameters
    assert weights is not None
    second, third = Setting(gpus=8, zero_stage=2), Setting(gpus=8, zero_stage=3)
    assert memory.training_state(weights, second) == {
        "weights": 2 * weights,
        "optimizer": 12 * weights / 8,
    }
    assert memory.training_state(weights, third) == {
        "weights": 2 * weights / 8,
        "optimizer": 12 * weights / 8,
    }
    for setting in (second, third):
        assert memory.gradients(weights, setting)["gradients"] == 4 * weights / 8
    plain = memory.training_state(weights, Setting())
    assert plain == {"weights": 4 * weights, "optimizer": 8 * weights}


def test_known_figures_in_gibibytes():
    third = Setting(gpus=8, zero_stage=3)
    optimizer = memory.training_state(3_821_079_552, third)["optimizer"]
    assert optimizer / GIB == pytest.approx(5.338, abs=1e-3)  # 12 × 3.82e9 / 8 / 2³⁰
    # Llama 3 keeps 128 KiB of keys and values a token: 2 × 2 bytes × 1024 × 32 layers
    cache = memory.kv_cache(shape(LLAMA3), rows=4, length=2048, setting=third)["KV cache"]
    assert cache == 4 * 2048 * 128 * 1024
    # 12 + 4 + 2 bytes a weight on the CPU with ZeRO 2, wherever the processes are
    assert host_memory.offloaded(10, Setting(gpus=8, zero_stage=2, offload_optimizer=True)) == 180
    # the head's gradient: 128,256 × 4096 in float32; two tiles; the states, their gradient and its
    # sum in float32
    found = memory.likelihood(shape(LLAMA3), 2048, Setting(), trained=True, head=True)
    by_hand = 128_256 * 4096 * 4 + 2 * 256 * 2**20 + 2048 * 4096 * (2 + 2 + 4)
    assert found["likelihood"] == by_hand


def test_float32_weights_are_their_own_masters_in_stage_3_alone():
    for stage, bytes_each in ((2, 4 + 12), (3, 4 + 8)):
        setting = Setting(gpus=1, zero_stage=stage, compute=4)
        assert memory.total(memory.training_state(1000, setting)) == 1000 * bytes_each


def test_checkpointing_keeps_one_layer_and_the_inputs_of_the_others():
    llama, tokens = shape(LLAMA3), 2 * 1024
    setting = Setting(gpus=8, zero_stage=2)
    whole = memory.training_activations(llama, 2, 1024, replace(setting, checkpointing=False))
    kept = memory.training_activations(llama, 2, 1024, setting)
    # norms 2·(4 + 2)·H + 2·2·H, attention 2·5·4096 + 4·32, feed-forward 4·2·I; the mask
    layer = tokens * (16 * 4096 + 40_960 + 128 + 8 * 14336) + 2 * 1024**2 * 3
    saved = whole["activations"] - kept["activations"]
    assert saved == 31 * layer - 32 * tokens * 2 * 4096


def test_adapters_are_as_many_as_peft_makes():
    from peft import LoraConfig as PeftConfig

    model = tiny.causal_lm()
    names = [n for n, m in model.model.named_modules() if type(m).__name__ == "Linear"]
    model.add_adapter(PeftConfig(r=3, target_modules=[f"model.{name}" for name in names]))
    made = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    found = config_shape(tiny.config())
    assert found.adapters(LoraConfig(rank=3)) == made
    some = found.adapters(LoraConfig(rank=3, targets=("q_proj", "up_proj")))
    assert some == 2 * 3 * (16 + 16 + 16 + 32)
    with pytest.raises(DenserlError, match="no linear layer nothing"):
        found.adapters(LoraConfig(targets=("nothing",)))


def test_a_shape_from_a_folder_counts_the_real_model(tmp_path: Path):
    for tied in (False, True):
        model = tiny.causal_lm(tied=tied)
        model.config.save_pretrained(tmp_path)
        found = configured_shape(str(tmp_path))
        assert found.parameters == sum(p.numel() for p in model.parameters())
        assert found.body == sum(p.numel() for p in model.base_model.parameters())
        assert found.tied == tied


def test_an_unknown_shape_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for text, said in (
        ('{"model_type": "t5"}', "a t5 model is not a causal"),
        ('{"model_type": "lla', "not a valid JSON"),
        ("{}", "model_type"),
        ('{"model_type": "llama", "hidden_size": "x"}', "hidden_size"),
    ):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(DenserlError, match=said) as error:
            configured_shape(str(tmp_path))
        assert error.value.hint
    with pytest.raises(DenserlError, match="nobody/has-this"):
        configured_shape("nobody/has-this")


def test_a_folder_of_its_own_comes_before_what_the_recipe_records(recipe: Recipe, tmp_path: Path):
    assert recipe_shape(recipe).parameters == LLAMA3.parameters
    tiny.config().save_pretrained(tmp_path / "model")
    own = replace(recipe, model=replace(recipe.model, path=str(tmp_path / "model")))
    assert recipe_shape(own).hidden == 16


def test_the_published_choice_is_the_first_that_fits_without_sharded_weights(recipe: Recipe):
    """The authors trained 8B policies on eight GPUs of 80 GB under ZeRO 2 with Adam on the CPU."""
    llama, peaks = shape(LLAMA3), {}
    for setting in planning.settings(recipe, "train-ppo", 8):
        key = (setting.zero_stage, setting.offload_optimizer, setting.offload_parameters)
        peaks[key] = phases.plan(recipe, llama, "train-ppo", setting).peak / GIB
    assert peaks[2, False, False] > 80 > peaks[2, True, False]
    assert peaks[0, False, False] > peaks[1, False, False] > peaks[2, False, False]


@pytest.mark.parametrize("stage", ["train-rm", "train-ppo"])
@pytest.mark.parametrize("gpus", [1, 8])
def test_the_words_of_a_setting_choose_it(stage: StageName, gpus: int, tmp_path: Path):
    file = write(tmp_path / "big.yaml")
    starts = [[], [f"{STAGES[stage].block}.engine={{zero_stage: 3, kind: deepspeed}}"]]
    starts.append([f"{STAGES[stage].block}.engine={{offload_optimizer: true}}"])
    own = "{zero_optimization: {offload_optimizer: {device: cpu}, offload_param: {device: none}}}"
    starts.append([f"{STAGES[stage].block}.engine.deepspeed={own}"])
    for start in starts:
        asked = load_recipe(file, start)
        for setting in planning.settings(asked, stage, gpus):
            overrides = planning.overrides_for(asked, stage, setting)
            chosen = load_recipe(file, [*start, *overrides])
            assert planning.recipe_setting(chosen, stage, gpus) == setting
            assert not planning.overrides_for(chosen, stage, setting)


@pytest.mark.parametrize(
    ("own", "optimizer", "parameters"),
    [
        ("{}", False, True),
        ("{offload_optimizer: {device: cpu}}", True, True),
        ("{offload_optimizer: {device: nvme}, offload_param: null}", True, False),
        ("{offload_optimizer: {device: none}, offload_param: {device: none}}", False, False),
        ("{offload_param: {pin_memory: false}}", False, True),  # laid over the field's
    ],
)
def test_offloading_in_the_recipes_own_deepspeed_settings_is_counted(
    own: str, optimizer: bool, parameters: bool, tmp_path: Path
):
    engine = "{zero_stage: 3, offload_parameters: true, deepspeed: {zero_optimization: %s}}"
    recipe = load_recipe(write(tmp_path / "big.yaml"), [f"ppo.engine={engine % own}"])
    setting = planning.recipe_setting(recipe, "train-ppo", 8)
    assert (setting.offload_optimizer, setting.offload_parameters) == (optimizer, parameters)
    said = planning.settings(recipe, "train-ppo", 8)
    assert setting in said or (parameters and not optimizer)


@pytest.mark.parametrize("stage", TRAINING)
def test_more_gpus_and_more_sharding_never_cost_memory(stage: StageName, recipe: Recipe):
    llama = shape(LLAMA3)

    def peak(gpus: int, zero: int) -> float:
        setting = replace(planning.recipe_setting(recipe, stage, gpus), zero_stage=zero)
        setting = replace(setting, shard_frozen=zero == 3)
        return phases.plan(recipe, llama, stage, setting).peak

    for zero in (1, 2, 3):
        assert peak(16, zero) <= peak(8, zero) <= peak(2, zero)
    assert peak(8, 3) < peak(8, 2) <= peak(8, 1)


def test_the_recipes_recipe_setting_is_kept_where_it_fits(recipe: Recipe):
    llama = shape(LLAMA3)
    own = planning.recipe_setting(recipe, "train-rm", 8)
    fits = planning.first_fit(recipe, llama, "train-rm", 8, 80 * GIB)
    assert fits is not None and fits.setting == own
    tight = planning.first_fit(recipe, llama, "train-rm", 8, 40 * GIB)
    assert tight is not None and tight.setting.zero_stage == 3
    assert not tight.setting.offload_optimizer


def test_what_is_proposed_where_nothing_fits_does_fit(tmp_path: Path):
    file = write(tmp_path / "big.yaml")
    recipe, llama, budget = load_recipe(file), shape(LLAMA3), 29 * GIB
    found = planning.assess(recipe, llama, "train-ppo", 2, budget)
    assert found.best is None and found.smallest.peak > budget
    assert found.remedies
    for remedy in found.remedies:
        overrides = planning.overrides_for(recipe, "train-ppo", remedy.plan.setting)
        changed = load_recipe(file, [*remedy.overrides, *overrides])
        setting = planning.recipe_setting(changed, "train-ppo", 2)
        assert phases.plan(changed, llama, "train-ppo", setting).peak <= budget


@pytest.mark.parametrize("sharded", [False, True])
def test_offloaded_frozen_models_are_on_the_gpu_while_they_score(recipe: Recipe, sharded: bool):
    llama = shape(LLAMA3)
    setting = replace(planning.recipe_setting(recipe, "train-ppo", 8), shard_frozen=sharded)
    whole = phases.plan(recipe, llama, "train-ppo", setting)
    offloaded = phases.plan(recipe, llama, "train-ppo", replace(setting, offload_frozen=True))
    frozen = whole.phases["score"]["frozen models"]
    for name, terms in whole.phases.items():
        there = frozen if name == "score" and not sharded else 0
        assert terms["frozen models"] == frozen
        assert offloaded.phases[name].get("frozen models", 0) == there
    assert offloaded.cpu >= 8 * frozen


def test_offloaded_optimizers_of_both_models_are_resident_together_and_gradients_stay(
    recipe: Recipe,
):
    """What DeepSpeed keeps where: float32 gradients on the GPU, masters and moments on the CPU."""
    llama = shape(LLAMA3)
    setting = Setting(gpus=8, zero_stage=2, offload_optimizer=True)
    found = phases.plan(recipe, llama, "train-ppo", setting)
    critic = llama.body + llama.hidden
    both = sum(
        host_memory.offloaded(trained, setting, widest=llama.embedding)
        for trained in (llama.parameters, critic)
    )
    assert found.cpu >= 0.99 * both
    for model, trained in (("policy", llama.parameters), ("critic", critic)):
        terms = found.phases[model]
        assert terms["gradients"] >= 4 * trained / 8
        assert terms.get("optimizer", 0) < 12 * trained / 8


def test_adapters_leave_the_base_once_and_train_little(recipe: Recipe):
    llama = shape(LLAMA3)
    lora = replace(recipe, lora=LoraConfig(rank=16))
    setting = planning.recipe_setting(lora, "train-ppo", 1)
    terms = phases.plan(lora, llama, "train-ppo", setting).phases["policy"]
    assert terms["frozen models"] == 2 * llama.parameters  # reference, RM, policy, critic: one base
    adapters = llama.adapters(LoraConfig(rank=16))
    assert terms["optimizer"] == 8 * (2 * adapters + 4096)
    quantized = replace(recipe, lora=LoraConfig(rank=16, quantize=True))
    small = phases.plan(quantized, llama, "train-ppo", setting).phases["policy"]
    assert small["frozen models"] < 0.4 * terms["frozen models"]


def test_without_a_critic_its_memory_is_free(recipe: Recipe):
    llama = shape(LLAMA3)
    alone = replace(
        recipe,
        ppo=replace(
            recipe.ppo, advantage="rloo", rollout=replace(recipe.ppo.rollout, samples_per_prompt=2)
        ),
    )
    for gpus in (1, 8):
        setting = planning.recipe_setting(recipe, "train-ppo", gpus)
        both, one = (phases.plan(r, llama, "train-ppo", setting) for r in (recipe, alone))
        assert set(both.phases) - set(one.phases) == {"critic"}
        state = memory.training_state(llama.body + llama.hidden, setting)
        saved = {
            name: both.phases["policy"].get(name, 0) - one.phases["policy"].get(name, 0)
            for name in ("weights", "optimizer")
        }
        assert saved == pytest.approx({name: state[name] for name in saved})
        assert one.peak < both.peak
