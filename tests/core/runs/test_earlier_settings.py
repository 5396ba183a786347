"""Settings of earlier releases under the names that they have now."""

from dataclasses import replace

from denserl_cli.core.recipe import load_recipe
from denserl_cli.core.recipe.defaults import resolved
from denserl_cli.core.recipe.schema import RewardSource
from denserl_cli.core.runs.earlier_settings import as_named_now
from denserl_cli.core.runs.settings import differences, result_settings

LATER = ("action", "advantage", "baseline", "kl_loss", "lam_value", "rollout.engine")
"""Some fields of `ppo` that the earlier release did not have."""


def recorded(settings: dict) -> dict:
    """The settings as the release before `ppo.rollout` and `ppo.rewards` recorded them."""
    old = {key: value for key, value in settings.items() if key not in {f"ppo.{n}" for n in LATER}}
    names = ("samples_per_prompt", "max_new_tokens", "temperature", "top_p")
    for name in names:
        old[f"ppo.{name}"] = old.pop(f"ppo.rollout.{name}")
    old["ppo.rollout_batch_size"] = old.pop("ppo.rollout.batch_size")
    del old["ppo.rewards"], old["sandbox.heads"]
    return old | {
        "ppo.reward_model_weight": 0.5,
        "ppo.reward": [{"function": "true_reward", "weight": 2.0}],
    }


def test_a_run_of_an_earlier_release_has_the_same_settings():
    recipe = resolved(load_recipe("sandbox-segment"))
    sources = (RewardSource("values", weight=0.5), RewardSource("true_reward", weight=2.0))
    now = result_settings(replace(recipe, ppo=replace(recipe.ppo, rewards=sources)), "train-ppo")
    assert differences(as_named_now(recorded(now), now), now) == []


def test_what_was_changed_since_is_still_a_difference():
    recipe = load_recipe("sandbox-segment", ["ppo.action=segment", "ppo.rollout.top_p=0.9"])
    now = result_settings(resolved(recipe), "train-ppo")
    old = recorded(result_settings(resolved(load_recipe("sandbox-segment")), "train-ppo"))
    changed = {line.partition(" ")[0] for line in differences(as_named_now(old, now), now)}
    assert changed >= {"ppo.action", "ppo.rollout.top_p", "ppo.rewards"}


def test_a_block_that_is_new_is_a_difference():
    recipe = load_recipe("sandbox-segment", ["lora={rank: 16}"])
    old = result_settings(load_recipe("sandbox-segment"), "train-rm")
    now = result_settings(recipe, "train-rm")
    changed = differences(as_named_now(old, now), now)
    assert any(line.startswith("lora.rank was null") for line in changed)
