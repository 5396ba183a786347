import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from denserl_cli.core.errors import DenserlError
from denserl_cli.core.planning.dry_run import plan_lines
from denserl_cli.core.recipe import load_recipe
from denserl_cli.core.recipe.schema import (
    DataConfig,
    ModelConfig,
    PPOConfig,
    Recipe,
    RecordedConfig,
    RewardModelConfig,
    RolloutConfig,
    SegmentationConfig,
    Source,
)
from tests import ROOT, tiny

HUB = (Source("org/data"),)
RECIPE = Recipe(
    name="tiny",
    model=ModelConfig(path="a/b"),
    segmentation=SegmentationConfig(cutoff=1.0),
    data=DataConfig(preferences=HUB, prompts=HUB),
    reward_model=RewardModelConfig(batch_size=128, micro_batch_size=8),
    ppo=PPOConfig(
        rollout=RolloutConfig(batch_size=64, samples_per_prompt=4), train_batch_size=32, epochs=2
    ),
)
UNKNOWN = "known when the data is read"


def recorded(**facts: int) -> Recipe:
    return replace(RECIPE, recorded=RecordedConfig(**facts))


def test_a_plan_of_data_whose_size_nobody_knows():
    assert plan_lines("train-rm", RECIPE) == [
        "model: a/b",
        f"pairs: {UNKNOWN}",
        "pairs per step: micro 8 × accumulation 16 × ranks 1 = global 128",
        f"steps: {UNKNOWN}",
    ]
    assert plan_lines("fit-function", RECIPE) == [
        "model: a/b",
        "pairs: 60,000 at most, the data's size is known when it is read",
        "pairs per forward pass: micro 8 × accumulation 1 × ranks 1 = global 8",
        "forward passes: about 7,500, of the reward model and of the reference",
        "reward model: the run's own",
    ]
    assert plan_lines("train-ppo", RECIPE) == [
        "model: a/b",
        f"prompts: {UNKNOWN}",
        "responses per iteration: 64 prompts × 4 samples = 256, up to 128 side by side as memory "
        "allows on a rank, scored up to 16 at a time",
        "responses per step: micro 4 × accumulation 8 × ranks 1 = global 32",
        "steps per iteration: 2 epochs × 8 = 16",
        f"iterations: {UNKNOWN}",
        "reward model: the run's own",
    ]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "30% of a GPU's memory while it samples, not counted by the plan"),
        ({"server": "http://host:8000"}, "sampled by the vLLM server at http://host:8000"),
    ],
)
def test_a_plan_says_that_it_does_not_count_vllm(settings: dict[str, str], said: str):
    rollout = replace(RECIPE.ppo.rollout, engine="vllm", memory_share=0.3, **settings)
    lines = plan_lines("train-ppo", replace(RECIPE, ppo=replace(RECIPE.ppo, rollout=rollout)))
    assert said in lines[2]


def test_iterations_that_the_recipe_sets_need_no_data():
    lines = plan_lines("train-ppo", replace(RECIPE, ppo=replace(RECIPE.ppo, iterations=7)))
    assert "iterations: 7 = ppo.iterations" in lines
    assert "optimizer steps: 7 × 16 = 112" in lines


def test_recorded_sizes_are_marked_and_at_most_a_tenth_is_held_out():
    small = recorded(preference_pairs=15_000, prompts=999, parameters=1_234_567_890)
    lines = plan_lines("train-rm", small)
    assert lines[0] == "model: a/b, 1.23B parameters (recorded)"
    assert lines[1] == "pairs: 15,000 (recorded), about 1,500 of them held out for evaluation"
    assert lines[3] == "steps: 105 = 13,500 pairs × 1 epochs / 128, if every row is usable"

    assert "pairs: 15,000 at most, of 15,000 (recorded)" in plan_lines("fit-function", small)

    lines = plan_lines("train-ppo", small)
    assert lines[1] == "prompts: 999 (recorded), about 64 of them held out for evaluation"
    assert "iterations: 14 = 935 prompts × 1 passes / 64, if every row is usable" in lines


def test_a_published_reward_model_stands_in_where_the_run_has_none():
    recipe = load_recipe("phi3-token")
    line = "reward model: the run's own if there is one, else " + recipe.published.reward_model
    assert line in plan_lines("fit-function", recipe)
    assert f"{line} with its published normaliser" in plan_lines("train-ppo", recipe)
    bare = replace(recipe, published=replace(recipe.published, normalizer=None))
    assert line in plan_lines("train-ppo", bare)


def test_evaluation_data_of_its_own_holds_nothing_out():
    recipe = recorded(preference_pairs=1280)
    recipe = replace(recipe, data=replace(recipe.data, evaluation=HUB))
    lines = plan_lines("train-rm", recipe)
    assert "pairs: 1,280 (recorded), about 0 of them held out for evaluation" in lines
    assert "steps: 10 = 1,280 pairs × 1 epochs / 128, if every row is usable" in lines


def test_data_that_make_no_batch_are_refused_as_the_stage_refuses_them():
    with pytest.raises(DenserlError, match=r"90 rows, reward_model\.batch_size is 128"):
        plan_lines("train-rm", recorded(preference_pairs=100))
    with pytest.raises(DenserlError, match=r"36 rows, ppo\.rollout\.batch_size is 64"):
        plan_lines("train-ppo", recorded(prompts=40))


def test_the_published_gpus_share_a_batch_or_the_plan_says_that_they_cannot():
    recipe = recorded(gpus=8)
    offload = replace(recipe.ppo.engine, offload_optimizer=True)
    recipe = replace(recipe, ppo=replace(recipe.ppo, engine=offload))
    assert plan_lines("train-rm", recipe)[-1] == (
        "on 8 GPUs, as published: micro 8 × accumulation 2 × ranks 8 = global 128; ZeRO-2"
    )
    assert plan_lines("train-ppo", recipe)[-1] == (
        "on 8 GPUs, as published: micro 4 × accumulation 1 × ranks 8 = global 32; "
        "ZeRO-2, Adam on the CPU"
    )
    own = {"zero_optimization": {"offload_optimizer": {"device": "none"}}}
    recipe = replace(recipe, ppo=replace(recipe.ppo, engine=replace(offload, deepspeed=own)))
    assert plan_lines("train-ppo", recipe)[-1].endswith("; ZeRO-2")
    assert plan_lines("train-rm", recorded(gpus=3))[-1] == (
        "on 3 GPUs, as published: reward_model.batch_size 128 is not a multiple of "
        "reward_model.micro_batch_size 8 × 3 processes; ZeRO-2"
    )


@pytest.mark.parametrize(
    ("settings", "gone"),
    [
        (["data.preferences=org/mine"], {"preference_pairs"}),
        (["data.preferences=[{path: hendrydong/preference_700K, max_samples: 9}]"],
         {"preference_pairs"}),
        (["data.prompts=org/mine"], {"prompts"}),
        (["model.path=org/mine"], {"parameters", "layers", "vocabulary"}),
        (["data.preferences=org/mine", "recorded.preference_pairs=5"], set()),
        (["ppo.kl_coef=0.1", "model.dtype=float32", "data.eval_pairs=3"], set()),
    ],
)  # fmt: skip
def test_recorded_facts_about_what_is_replaced_are_forgotten(settings: list[str], gone: set[str]):
    facts = load_recipe("llama3.1-segment", settings).recorded
    names = {"preference_pairs", "prompts", "parameters", "layers", "vocabulary"}
    assert {name for name in names if getattr(facts, name) is None} == gone
    assert facts.gpus == 8
    assert facts.gated == ("parameters" not in gone)


def test_a_recipe_that_extends_with_other_data_forgets_as_well(tmp_path: Path):
    file = tmp_path / "mine.yaml"
    file.write_text("extends: phi3-token\ndata: {preferences: org/mine}\n")
    facts = load_recipe(str(file)).recorded
    assert (facts.preference_pairs, facts.prompts) == (None, 60917)
    file.write_text(
        "extends: phi3-token\ndata: {preferences: org/mine}\nrecorded: {preference_pairs: 77}\n"
    )
    assert load_recipe(str(file)).recorded.preference_pairs == 77


def test_a_plan_of_the_sandbox_is_what_the_sandbox_does(scored: Path):
    recipe = tiny.recipe()
    lines = plan_lines("train-rm", recipe)
    done = json.loads((scored / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    # 80 pairs of 64 prompts; 4 are held out
    assert f"steps: {done} = 76 pairs × 1 epochs / 8, if every row is usable" in lines
    assert "pairs: 40 at most, of 80 (of the sandbox)" in plan_lines("fit-function", recipe)
    assert "prompts: 64 (of the sandbox), about 2 of them held out for evaluation" in plan_lines(
        "train-ppo", recipe
    )


def test_plans_need_no_network_and_no_torch():
    program = (
        "import sys\n"
        "from denserl_cli.app import app\n"
        "from typer.testing import CliRunner\n"
        "for name in ('phi3-segment', 'qwen3-segment', 'sandbox-token'):\n"
        "    for stage in ('train-rm', 'fit-function', 'train-ppo'):\n"
        "        done = CliRunner().invoke(app, [stage, '-r', name, '--dry-run'])\n"
        "        assert done.exit_code == 0, done.exception\n"
        "heavy = {'torch', 'transformers', 'datasets', 'huggingface_hub', 'httpx', 'requests'}\n"
        "sys.exit(' '.join(heavy & set(sys.modules)) or 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
