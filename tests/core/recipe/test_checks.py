from dataclasses import replace

import pytest

from denserl_cli.core.recipe.checks import looks_local, problems
from denserl_cli.core.recipe.defaults import resolved
from denserl_cli.core.recipe.schema import (
    EngineConfig,
    LoraConfig,
    ModelConfig,
    Recipe,
    RolloutConfig,
    SegmentationConfig,
    Source,
)

GOOD = resolved(
    Recipe(
        name="good",
        model=ModelConfig(path="org/model"),
        segmentation=SegmentationConfig(granularity="segment", cutoff=1.75),
    )
)
BANDIT = resolved(
    replace(
        GOOD,
        segmentation=SegmentationConfig(granularity="bandit"),
        normalizer=replace(GOOD.normalizer, kind=None),
        ppo=replace(GOOD.ppo, interpolation=None),
    )
)


def changed(recipe: Recipe, **blocks) -> Recipe:
    """`ppo={"gamma": 2}` replaces fields of a block; other values replace the field itself."""
    new = {
        name: replace(getattr(recipe, name), **value) if isinstance(value, dict) else value
        for name, value in blocks.items()
    }
    return replace(recipe, **new)


def keys(recipe: Recipe) -> list[str]:
    return [problem.key for problem in problems(recipe)]


def test_good_recipes_have_no_problems():
    assert keys(GOOD) == [] and keys(BANDIT) == []


@pytest.mark.parametrize(
    ("block", "name", "value"),
    [
        ("reward_model", "learning_rate", 0.0),
        ("ppo", "iterations", 0),
        ("ppo", "gamma", -0.1),
        ("ppo", "lam", 1.01),
        ("ppo", "kl_coef", -1.0),
        ("segmentation", "cutoff", -1.0),
        ("optimizer", "warmup_ratio", 2.0),
        ("run", "keep_checkpoints", 0),
    ],
)
def test_values_out_of_range(block: str, name: str, value: float):
    assert keys(changed(GOOD, **{block: {name: value}})) == [f"{block}.{name}"]


@pytest.mark.parametrize(("name", "value"), [("top_p", 0.0), ("top_p", 1.5), ("rows", 0)])
def test_values_of_a_rollout_out_of_range(name: str, value: float):
    assert keys(changed(GOOD, ppo={"rollout": RolloutConfig(**{name: value})})) == [
        f"ppo.rollout.{name}"
    ]


@pytest.mark.parametrize(("name", "value"), [("kl_coef", 0.0), ("gamma", 0.0)])
def test_values_on_the_border_are_in_range(name: str, value: float):
    assert keys(changed(GOOD, ppo={name: value})) == []


def test_ranges_inside_lists():
    assert keys(changed(GOOD, optimizer={"betas": (0.9, 1.0)})) == ["optimizer.betas[1]"]
    sources = (Source("a/b"), Source("", weight=0.0, max_samples=0))
    assert keys(changed(GOOD, data={"prompts": sources})) == [
        "data.prompts[1].path",
        "data.prompts[1].weight",
        "data.prompts[1].max_samples",
    ]


@pytest.mark.parametrize("name", ["", "..", ".hidden", "a/b", "a\\b"])
def test_a_name_must_name_a_folder(name: str):
    assert keys(replace(GOOD, name=name)) == ["name"]


@pytest.mark.parametrize(
    ("recipe", "key"),
    [
        (changed(GOOD, segmentation={"cutoff": None}), "segmentation.cutoff"),
        (changed(GOOD, segmentation={"granularity": "token"}), "segmentation.cutoff"),
        (changed(BANDIT, normalizer={"kind": "location"}), "normalizer.kind"),
        (changed(BANDIT, ppo={"interpolation": "even"}), "ppo.interpolation"),
        (changed(BANDIT, ppo={"interpolation": "repeat"}), "ppo.interpolation"),
        (changed(GOOD, ppo={"max_response_tokens": 800}), "ppo.overlong_penalty"),
        (changed(GOOD, ppo={"overlong_penalty": -0.05}), "ppo.max_response_tokens"),
        (changed(GOOD, ppo={"kl_target": 0.1, "kl_coef": 0.0}), "ppo.kl_coef"),
        (changed(GOOD, data={"max_prompt_length": 2048}), "data.max_prompt_length"),
        (changed(GOOD, reward_model={"batch_size": 12}), "reward_model.batch_size"),
        (changed(GOOD, ppo={"rollout": RolloutConfig(batch_size=1000)}), "ppo.train_batch_size"),
        (changed(GOOD, ppo={"micro_batch_size": 3}), "ppo.train_batch_size"),
        (changed(GOOD, model={"path": ""}), "model.path"),
    ],
)
def test_impossible_combinations(recipe: Recipe, key: str):
    assert keys(recipe) == [key]


@pytest.mark.parametrize(
    ("block", "engine", "lora", "key"),
    [
        ("ppo", EngineConfig(offload_parameters=True), None, "ppo.engine.offload_parameters"),
        ("ppo", EngineConfig(offload_frozen=True), LoraConfig(), "ppo.engine.offload_frozen"),
        ("ppo", EngineConfig(shard_frozen=True), LoraConfig(), "ppo.engine.shard_frozen"),
        (
            "reward_model",
            EngineConfig(offload_frozen=True),
            None,
            "reward_model.engine.offload_frozen",
        ),
        (
            "reward_model",
            EngineConfig(deepspeed={"zero_optimization": {"stage": 3}}),
            None,
            "reward_model.engine.deepspeed",
        ),
    ],
)
def test_what_an_engine_cannot_do(block: str, engine: EngineConfig, lora, key: str):
    assert keys(changed(GOOD, **{block: {"engine": engine}}, lora=lora)) == [key]


def test_more_samples_per_prompt_fill_the_train_batch():
    ppo = {"rollout": RolloutConfig(batch_size=64, samples_per_prompt=2)}
    assert keys(changed(GOOD, ppo=ppo)) == []


def test_paths_that_can_only_be_local_must_exist(tmp_path):
    data = tmp_path / "pairs.jsonl"
    missing = changed(
        GOOD,
        model={"path": "./gone"},
        data={"preferences": (Source(str(data)), Source("hub/data"))},
    )
    assert keys(missing) == ["data.preferences[0].path", "model.path"]
    data.touch()
    assert keys(changed(missing, model={"path": str(tmp_path)})) == []


@pytest.mark.parametrize("path", ["/a", "./a", "../a", "~/a", "a.jsonl", "b/a.json", "a/b/c"])
def test_local_paths(path: str):
    assert looks_local(path)


@pytest.mark.parametrize("path", ["gpt2", "org/model", "org/model.v2"])
def test_hub_names(path: str):
    assert not looks_local(path)


def test_paths_that_no_system_can_have_are_missing():
    for path in ("~nobody-of-this-name/m", "./" + "x" * 5000, "./a\0b"):
        assert keys(changed(GOOD, model={"path": path})) == ["model.path"]


def test_resolved_fills_in_what_follows_from_the_granularity(monkeypatch):
    assert (GOOD.normalizer.kind, GOOD.ppo.interpolation) == ("location", "even")
    assert (BANDIT.normalizer.kind, BANDIT.ppo.interpolation) == ("global", "end")
    chosen = changed(GOOD, normalizer={"kind": "none"}, ppo={"interpolation": "repeat"})
    assert resolved(chosen) == chosen
    monkeypatch.setenv("HOME", "/somebody")
    at_home = changed(GOOD, model={"path": "~/m"}, data={"prompts": (Source("~/p.jsonl"),)})
    assert resolved(at_home).model.path == "/somebody/m"
    assert resolved(at_home).data.prompts[0].path == "/somebody/p.jsonl"
