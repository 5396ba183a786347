"""What is wrong with `ppo.rewards` is said when a recipe is loaded, with the field to change."""

from __future__ import annotations

import pytest

from denserl_cli.core.errors import RecipeError
from denserl_cli.core.planning.dry_run import plan_lines
from denserl_cli.core.recipe import load_recipe, recipe_to_yaml
from denserl_cli.core.recipe.loader import load_recipe as load


def refused(*settings: str, recipe: str = "sandbox-segment") -> list[str]:
    with pytest.raises(RecipeError) as found:
        load_recipe(recipe, settings)
    return str(found.value).splitlines()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (["ppo.reward=true_reward"], "[true_reward]"),
        (["ppo.reward_model_weight=0.5"], "[{source: values, weight: 0.5}]"),
        (["ppo.reward_model_weight=1"], "[values]"),
        (
            ["ppo.reward=[python:a.b, {function: c, weight: 2}]", "ppo.reward_model_weight=1"],
            "[values, python:a.b, {source: c, weight: 2}]",
        ),
        (["ppo.reward=true_reward", "ppo.reward_model_weight=0"], "[true_reward]"),
    ],
)
def test_the_old_spelling_is_refused_with_the_new_one(old: list[str], new: str):
    lines = refused(*old)
    assert len([line for line in lines if line.endswith(f"write ppo.rewards: {new}")]) == len(old)
    if "python:a.b" not in new and "source: c" not in new:
        assert load_recipe("sandbox-segment", [f"ppo.rewards={new}"]).ppo.rewards


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["ppo.rewards=difference"], "ppo.rewards[0].source: no installed reward is called"),
        (["ppo.rewards=difference"], "did you mean differences?"),
        (["ppo.rewards=[values, values]"], "ppo.rewards[1].source: a second reward called values"),
        (["ppo.rewards=log_ratio"], "ppo.rewards[0].model: missing; log_ratio compares"),
        (
            ["ppo.rewards=[{source: log_ratio, model: a/b}]", "model.path=a/b", "sandbox=null"],
            "ppo.rewards[0].model: is the reference itself",
        ),
        (
            ["ppo.rewards=[values, {source: log_ratio, model: a/b}]", "lora={}"],
            "ppo.rewards[1].source: log_ratio degenerates where adapters train few directions",
        ),
        (["ppo.rewards=differences", "ppo.gamma=0.9"], "ppo.gamma: differences of values add up"),
        (["ppo.rewards=attention", "ppo.length_normalize=true"], "ppo.length_normalize: attention"),
        (["ppo.rewards=shapley", "ppo.interpolation=repeat"], "ppo.interpolation: shapley"),
        (
            ["ppo.rewards=[{source: values, clip: 1}]"],
            "ppo.rewards[0].clip: belongs to log_ratio, not to values",
        ),
        (
            ["ppo.rewards=[{source: shapley, permutations: 0}]"],
            "ppo.rewards[0].permutations: must be positive",
        ),
        (["ppo.rewards=[{source: values, revision: x}]"], "ppo.rewards[0].revision: is that of a"),
        (["ppo.rewards=[{source: score, model: ./absent}]"], "no such file or folder: ./absent"),
        (["ppo.softmin_temperature=0"], "ppo.softmin_temperature: must be positive"),
        (
            ["ppo.rewards=[{source: score, model: a/b}]", "ppo.critic_init=reward_model"],
            "ppo.critic_init: there is no reward model",
        ),
    ],
)
def test_a_source_that_does_not_fit_names_the_field(settings: list[str], message: str):
    assert any(message in line for line in refused(*settings)), refused(*settings)


def test_one_segment_has_no_shapley_values():
    (line,) = refused("ppo.rewards=shapley", recipe="sandbox-bandit")
    assert "ppo.rewards[0].source: shapley shares a score among segments" in line


def test_the_settings_of_a_source_are_filled_in_and_come_back(tmp_path):
    rewards = "[{source: log_ratio, model: a/b}, {source: shapley, name: fair}, score]"
    recipe = load_recipe("sandbox-segment", [f"ppo.rewards={rewards}"])
    ratio, fair, score = recipe.ppo.rewards
    assert (ratio.scale, ratio.clip, fair.permutations) == (0.05, 0.05, 8)
    assert (fair.label, fair.metric, ratio.metric) == ("fair", "rm_score", "reward_log_ratio")
    assert (score.scale, score.permutations) == (None, None)
    file = tmp_path / "again.yaml"
    file.write_text(recipe_to_yaml(recipe))
    assert load(str(file)) == recipe


def test_the_plan_counts_what_sources_cost():
    rewards = (
        "[{source: shapley, permutations: 3}, {source: log_ratio, model: a/b}, "
        "{source: score, model: c/d}]"
    )
    text = "\n".join(
        plan_lines("train-ppo", load_recipe("sandbox-segment", [f"ppo.rewards={rewards}"]))
    )
    assert "2^K up to 6, 3 × (K − 1) + 2 above" in text
    assert "reward: log_ratio × 1 (one more model, a/b: 1 pass)" in text
    assert "one more model, c/d: 1 pass" in text
