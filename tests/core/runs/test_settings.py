"""Settings by dotted name."""

from denserl_cli.core.recipe import load_recipe
from denserl_cli.core.runs.settings import differences, flat, result_settings, stage_settings


def test_a_nested_mapping_by_dotted_names():
    tree = {"a": {"b": 1, "c": {"d": [2]}}, "e": None, "f": {}}
    assert flat(tree) == {"a.b": 1, "a.c.d": [2], "e": None}


def test_differences_are_named_and_sorted():
    old, new = {"b": 1, "gone": None, "same": (1, 2)}, {"b": 2.0, "a": "x", "same": [1, 2]}
    assert differences(old, new) == ['a was null, is "x"', "b was 1, is 2.0"]
    assert differences(old, new, ignored=["b"]) == ['a was null, is "x"']


def test_a_stage_reads_its_own_blocks_and_results_do_not_depend_on_memory():
    recipe = load_recipe("sandbox-segment")
    read, deciding = stage_settings(recipe, "train-rm"), result_settings(recipe, "train-rm")
    assert read["reward_model.epochs"] == recipe.reward_model.epochs
    assert not any(name.startswith(("ppo.", "normalizer.", "run.")) for name in read)
    assert read.keys() - deciding.keys() == {
        "model.gradient_checkpointing",
        "model.packing",
        "reward_model.micro_batch_size",
    }
