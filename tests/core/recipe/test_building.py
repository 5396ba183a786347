import pytest

from denserl_cli.core.recipe.building import INVALID, Builder, describe, known_keys
from denserl_cli.core.recipe.document import read_document
from denserl_cli.core.recipe.schema import (
    MOVED,
    DataConfig,
    Granularity,
    OptimizerConfig,
    PPOConfig,
    Recipe,
    RewardModelConfig,
    Source,
)


def build(section, text: str):
    node = read_document(text, lambda at: at, [])
    builder = Builder()
    return builder.build(section, node), builder


def test_values_reach_their_fields_and_the_rest_keeps_its_default():
    ppo, builder = build(PPOConfig, "{epochs: 3, gamma: 1, kl_coef: 1e-3, kl_target: null}")
    assert builder.problems == []
    assert (ppo.epochs, ppo.gamma, ppo.kl_coef, ppo.kl_target) == (3, 1.0, 1e-3, None)
    assert type(ppo.gamma) is float
    assert ppo.lam == PPOConfig().lam


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("epochs: true", "1: epochs: must be an integer, not true"),
        ("epochs: 1.0", "1: epochs: must be an integer, not the number 1.0"),
        ("epochs: '1'", "1: epochs: must be an integer, not the text '1'"),
        ("epochs: null", "1: epochs: must be an integer, not null"),
        ("gamma: [1]", "1: gamma: must be a number, not a list of 1"),
        ("gamma: '1e-6'", "1: gamma: must be a number, not the text '1e-6'"),
        ("gamma: .inf", "1: gamma: must be a finite number, not inf"),
        ("gamma: .nan", "1: gamma: must be a finite number, not nan"),
        ("kl_target: {}", "1: kl_target: must be a number, not a mapping"),
        ("length_normalize: on", "1: length_normalize: must be true or false, not the text 'on'"),
        ("length_normalize: 1", "1: length_normalize: must be true or false, not the number 1"),
        (
            "segment_total: maen",
            "1: segment_total: must be sum or mean, not the text 'maen', did you mean mean?",
        ),
        ("segment_total: {}", "1: segment_total: must be sum or mean, not a mapping"),
    ],
)
def test_a_wrong_type_is_named_with_what_was_found(text: str, problem: str):
    _, builder = build(PPOConfig, text)
    assert builder.problems == [problem]
    assert builder.doubtful == {text.partition(":")[0]}


def test_text_must_be_quoted_where_yaml_sees_something_else():
    _, builder = build(Recipe, "name: 42")
    assert builder.problems == ["1: name: must be text, not the number 42; put it in quotes"]


def test_all_problems_of_all_blocks_are_collected():
    text = "name: x\nppo:\n  epochs: a\n  gama: 1\nmodel:\nsandbox: 3\n"
    _, builder = build(Recipe, text)
    assert builder.problems == [
        "3: ppo.epochs: must be an integer, not the text 'a'",
        "4: unknown key ppo.gama, did you mean ppo.gamma?",
        "5: model: must be a block of settings, not null; write {} for its defaults",
        "6: sandbox: must be a block of settings, not the number 3",
    ]


@pytest.mark.parametrize(
    ("text", "near"),
    [
        ("kl_coef: 1", "kl_coef, did you mean ppo.kl_coef?"),
        ("kl_coeff: 1", "kl_coeff, did you mean ppo.kl_coef?"),
        ("batch_size: 1", "batch_size, did you mean reward_model.batch_size or normalizer.batch"),
        ("ppo: {batch_size: 1}", "ppo.batch_size, did you mean ppo."),
        ("ppo: {cutoff: 1}", "ppo.cutoff, did you mean segmentation.cutoff or published.cutoff?"),
        ("pppo: {}", "pppo, did you mean ppo?"),
        ("reward_model: {max_lenght: 1}", "reward_model.max_lenght, did you mean data.max_length?"),
        ("ppo: {lambda: 1}", "ppo.lambda, did you mean ppo.lam?"),
        ("ppo: {xyzzy: 1}", "ppo.xyzzy"),
        ("ppo.kl_coef: 1", "'ppo.kl_coef'; dots are for --set, nest the blocks here"),
    ],
)
def test_an_unknown_key_is_named_with_the_key_it_may_mean(text: str, near: str):
    _, builder = build(Recipe, "name: x\n" + text)
    assert len(builder.problems) == 1
    assert builder.problems[0].startswith(f"2: unknown key {near}")


def test_sources_may_be_text_a_mapping_or_a_list_of_either():
    for text in ("a/b", "[a/b]", "{path: a/b}", "[{path: a/b}]"):
        data, builder = build(DataConfig, f"prompts: {text}")
        assert builder.problems == []
        assert data.prompts == (Source(path="a/b"),)


def test_a_source_without_path_and_one_with_a_misspelt_path():
    data, builder = build(DataConfig, "prompts:\n- weight: 2\n- pth: a\n")
    assert data.prompts == ()
    assert builder.problems == [
        "2: prompts[0].path: missing",
        "3: unknown key prompts[1].pth, did you mean prompts[1].path?",
    ]


def test_lists_of_a_fixed_length():
    optimizer, _ = build(OptimizerConfig, "betas: [0, 0.5]")
    assert optimizer.betas == (0.0, 0.5)
    for text in ("[0.9]", "[0.9, 0.9, 0.9]", "0.9"):
        _, builder = build(OptimizerConfig, f"betas: {text}")
        assert builder.problems[0].startswith("1: betas: must be a list of 2 numbers, not ")
    _, builder = build(OptimizerConfig, "betas: [0.9, x]")
    assert builder.problems == ["1: betas[1]: must be a number, not the text 'x'"]


def test_a_recipe_without_its_name_is_invalid():
    recipe, builder = build(Recipe, "seed: 1")
    assert recipe is INVALID
    assert builder.problems == ["1: name: missing"]


def test_known_keys_are_dotted():
    assert {"name", "ppo", "ppo.kl_coef", "sandbox.phrases"} <= set(known_keys())
    assert len(known_keys()) == len(set(known_keys()))


def test_types_in_words():
    assert describe(Granularity) == "segment, token or bandit"
    assert describe(int | None) == "an integer or null"
    assert describe(tuple[Source, ...]) == "a list of sources"
    assert describe(RewardModelConfig) == "a block of settings"
    assert describe(dict[str, int]) == "a mapping"


@pytest.mark.parametrize(("old", "new"), MOVED.items())
def test_a_field_that_has_moved_names_its_place(old: str, new: str):
    assert old not in known_keys() and new in known_keys()
    block, name = old.split(".")
    tree = read_document(f"{block}:\n  {name}: 1", lambda at: at, [])
    builder = Builder()
    builder.build(Recipe, tree)
    assert f"2: {old} has moved: write {new}" in builder.problems
