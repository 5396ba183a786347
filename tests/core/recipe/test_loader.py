from pathlib import Path

import pytest

from denserl_cli.core.errors import DenserlError, RecipeError
from denserl_cli.core.recipe import Recipe, load_recipe
from denserl_cli.core.recipe.catalog import list_recipes
from denserl_cli.core.recipe.loader import Override
from denserl_cli.core.recipe.schema import Source

GOOD = """\
description: a good one
model:
  path: org/model
segmentation:
  cutoff: 1.75
ppo:
  actor_learning_rate: 1e-6
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(name: str, text: str) -> str:
    Path(name).write_text(text, encoding="utf-8")
    return name


def found(name: str, overrides=()) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(name, overrides)
    return list(caught.value.problems)


def test_a_recipe_is_loaded_and_completed():
    recipe = load_recipe(write("good.yaml", GOOD))
    assert isinstance(recipe, Recipe)
    assert recipe.name == "good"
    assert recipe.ppo.actor_learning_rate == 1e-6
    assert recipe.normalizer.kind == "location"


@pytest.mark.parametrize("name", list_recipes())
def test_every_shipped_recipe_loads(name: str):
    assert load_recipe(name).name == name


def test_problems_of_every_kind_are_reported_at_once():
    text = """\
model:
  path: ./gone
segmentation:
  granularity: bandit
  cutoff: 2
ppo:
  kl_coeff: 0.1
  epochs: true
  epochs: 2
  gamma: 2
data:
  preferences: gone.jsonl
"""
    overrides = ["ppo.lam=x", "run.log_samples=-1", "nonsense", "ppo.lam=["]
    assert found(write("r.yaml", text), overrides) == [
        "r.yaml:9: duplicate key ppo.epochs, first at r.yaml:8",
        "--set nonsense: must be KEY=VALUE, for example --set ppo.kl_coef=0.02",
        "--set ppo.lam=[: not valid YAML: while parsing a flow node, "
        "expected the node content, but found '<stream end>'",
        "r.yaml:7: unknown key ppo.kl_coeff, did you mean ppo.kl_coef?",
        "r.yaml:8: ppo.epochs: must be an integer, not true",
        "--set ppo.lam=x: ppo.lam: must be a number or adaptive, not the text 'x'",
        "--set run.log_samples=-1: run.log_samples: must be zero or more, not -1",
        "r.yaml:10: ppo.gamma: must be between 0 and 1, not 2.0",
        "r.yaml:5: segmentation.cutoff: bandit has no cutoff; set it to null",
        "r.yaml:12: data.preferences[0].path: no such file or folder: gone.jsonl",
        "r.yaml:2: model.path: no such file or folder: ./gone",
    ]


def test_nothing_is_concluded_from_a_value_that_is_wrong_itself():
    text = GOOD.replace("cutoff", "cutof").replace("ppo:", "ppo:\n  train_batch_size: 100")
    assert found(write("r.yaml", text + "  rollout: {batch_size: 1e3}\n")) == [
        "r.yaml:5: unknown key segmentation.cutof, did you mean segmentation.cutoff?",
        "r.yaml:9: ppo.rollout.batch_size: must be an integer, not the number 1000.0",
    ]


def test_an_absent_key_is_reported_where_its_absence_became_wrong():
    token = GOOD.replace("cutoff: 1.75", "granularity: token")
    override = "segmentation.granularity=segment"
    assert found(write("r.yaml", token), [override])[0].startswith(
        f"--set {override}: segmentation.cutoff: segment needs a cutoff"
    )
    text = GOOD.replace("  cutoff: 1.75", "  granularity: segment")
    assert found(write("s.yaml", text))[0].startswith("s.yaml:5: segmentation.cutoff: segment")
    text = GOOD.replace("  path: org/model", "  dtype: auto")
    assert found(write("m.yaml", text)) == [
        "m.yaml:2: model.path: missing; name a hub model or a folder"
    ]
    assert found(write("n.yaml", "segmentation: {granularity: token}")) == [
        "n.yaml:1: model.path: missing; name a hub model or a folder"
    ]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "r.yaml: empty; a recipe is a mapping of blocks"),
        ("  \n", "r.yaml: empty; a recipe is a mapping of blocks"),
        ("# only a comment\n", "r.yaml:1: a recipe is a mapping of blocks, such as `ppo:`"),
        ("- a\n", "r.yaml:1: a recipe is a mapping of blocks, such as `ppo:`"),
        ("a: [\n", "r.yaml:2:1: not valid YAML: while parsing a flow node, expected the node"),
        ("a: !!python/name:os.system\n", "r.yaml:1: tags (tag:yaml.org,2002:python/name:os.system"),
    ],
)
def test_files_that_hold_no_recipe(text: str, problem: str):
    problems = found(write("r.yaml", text))
    assert len(problems) == 1 and problems[0].startswith(problem)


def test_files_that_cannot_be_read(here: Path):
    Path("latin.yaml").write_bytes(b"description: caf\xe9\n")
    with pytest.raises(DenserlError, match=r"latin\.yaml is not UTF-8 text \(byte 16\)"):
        load_recipe("latin.yaml")
    with pytest.raises(DenserlError, match=r"is a folder, not a recipe"):
        load_recipe(str(here))
    with pytest.raises(DenserlError, match=r"no recipe 'nowhere\.yaml'") as caught:
        load_recipe("nowhere.yaml")
    assert "denserl recipes list" in caught.value.hint


def test_a_file_that_the_system_refuses(monkeypatch):
    def refuse(*_: object, **__: object) -> str:
        raise PermissionError(13, "Permission denied")

    write("good.yaml", GOOD)
    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(DenserlError, match=r"cannot read good\.yaml: Permission denied"):
        load_recipe("good.yaml")


def test_a_name_of_the_wrong_type():
    assert found(write("r.yaml", GOOD + "name: 42\n")) == [
        "r.yaml:8: name: must be text, not the number 42; put it in quotes"
    ]


def test_a_byte_order_mark_is_no_problem():
    Path("bom.yaml").write_text(GOOD, encoding="utf-8-sig")
    assert load_recipe("bom.yaml").description == "a good one"


# --- extends


def test_a_base_merges_block_by_block_and_lists_replace():
    base = (
        GOOD + "  gamma: 0.9\ndata:\n  prompts: [a/b, c/d]\n  preferences: {path: e/f, weight: 2}\n"
    )
    Path("bases").mkdir()
    write("bases/base.yaml", "name: base\n" + base)
    child = "extends: bases/base.yaml\nppo:\n  lam: 0.5\n  gamma: 0.8\n"
    recipe = load_recipe(
        write("child.yaml", child + "data:\n  prompts: [g/h]\n  preferences: {path: i/j}\n")
    )
    assert (recipe.name, recipe.description) == ("child", "")
    assert recipe.model.path == "org/model"
    assert (recipe.ppo.lam, recipe.ppo.gamma, recipe.ppo.actor_learning_rate) == (0.5, 0.8, 1e-6)
    assert recipe.data.prompts == (Source("g/h"),)
    assert recipe.data.preferences == (Source("i/j"),)


@pytest.mark.parametrize("inherited", ["{path: e/f, weight: 2}", "[{path: e/f, weight: 2}]"])
def test_an_override_of_one_field_of_the_only_source_keeps_the_others(inherited: str):
    file = write("r.yaml", f"{GOOD}data:\n  preferences: {inherited}\n  prompts: a/b\n")
    recipe = load_recipe(file, ["data.preferences.max_samples=7", "data.prompts.max_samples=3"])
    assert recipe.data.preferences == (Source("e/f", weight=2.0, max_samples=7),)
    assert recipe.data.prompts == (Source("a/b", max_samples=3),)
    recipe = load_recipe(file, ["data.preferences={path: i/j}"])
    assert recipe.data.preferences == (Source("i/j"),)


def test_an_override_of_one_field_of_several_sources_says_that_it_needs_a_path():
    file = write("r.yaml", GOOD + "data:\n  preferences: [a/b, c/d]\n")
    with pytest.raises(RecipeError, match=r"max_samples=7: data.preferences.*path: missing"):
        load_recipe(file, ["data.preferences.max_samples=7"])


def test_a_base_is_found_beside_the_file_and_may_have_a_base():
    Path("sub").mkdir()
    write("sub/a.yaml", GOOD)
    write("sub/b.yaml", "extends: a.yaml\nseed: 1\n")
    assert load_recipe(write("sub/c.yaml", "extends: ./b.yaml\n")).seed == 1
    assert load_recipe("sub/c.yaml").model.path == "org/model"


def test_null_removes_an_optional_block_and_no_other():
    write("base.yaml", GOOD.replace("model:\n  path: org/model", "sandbox: {phrases: 4}"))
    text = "extends: base.yaml\nsandbox: null\nmodel: {path: org/model}\n"
    recipe = load_recipe(write("child.yaml", text))
    assert recipe.sandbox is None
    problems = found(write("other.yaml", "extends: base.yaml\nppo: null\n"))
    refusal = "ppo: must be a block of settings, not null; write {} for its defaults"
    assert problems == [f"other.yaml:2: {refusal}"]


@pytest.mark.parametrize("nothing", ["{}", "null", ""])
def test_an_inherited_mapping_is_emptied(nothing: str):
    text = GOOD + "chat:\n  template_arguments: {enable_thinking: false}\n  stop_tokens: [x]\n"
    write("base.yaml", text)
    child = f"extends: base.yaml\nchat:\n  template_arguments: {nothing}\n"
    recipe = load_recipe(write("child.yaml", child))
    assert recipe.chat.template_arguments == {} and recipe.chat.stop_tokens == ("x",)
    kept = load_recipe("base.yaml", [f"chat.template_arguments={nothing or 'null'}"])
    assert kept.chat.template_arguments == {}
    again = ["chat.template_arguments={}", "chat.template_arguments.date=now"]
    assert load_recipe("base.yaml", again).chat.template_arguments == {"date": "now"}


def test_an_empty_block_takes_its_defaults_and_an_empty_recipe_its_base():
    write("base.yaml", GOOD + "  gamma: 0.5\nrecorded: {gpus: 8, layers: 3}\n")
    recipe = load_recipe(write("child.yaml", "extends: base.yaml\nppo: {}\n"))
    assert (recipe.ppo.gamma, recipe.model.path) == (1.0, "org/model")
    assert load_recipe(write("same.yaml", "extends: base.yaml\n")).ppo.gamma == 0.5
    text = "extends: base.yaml\nmodel: {}\nsandbox: {}\n"
    assert load_recipe(write("other.yaml", text)).recorded.layers is None


def test_an_inherited_value_is_reported_where_it_can_be_overridden():
    write("base.yaml", GOOD)
    child = "extends: base.yaml\nsegmentation:\n  cut: sentence\n"
    assert found(write("child.yaml", child)) == [
        "child.yaml:3: segmentation.cutoff: belongs to cut entropy, not to sentence; set it to "
        "null; the value is from base.yaml:5, override it in child.yaml"
    ]
    override = "segmentation.granularity=token"
    assert found("base.yaml", [override]) == [
        f"--set {override}: segmentation.cutoff: token has no cutoff; set it to null; the value is "
        "from base.yaml:5, override it with --set segmentation.cutoff=..."
    ]
    write("wrong.yaml", GOOD + "  gamma: 3\n")
    assert found(write("inherits.yaml", "extends: wrong.yaml\n")) == [
        "wrong.yaml:8: ppo.gamma: must be between 0 and 1, not 3.0; override it in inherits.yaml"
    ]


def test_problems_of_a_base_name_the_base():
    write("base.yaml", GOOD + "  gama: 1\n")
    assert found(write("child.yaml", "extends: base.yaml\nsed: 1\n")) == [
        "base.yaml:8: unknown key ppo.gama, did you mean ppo.gamma?",
        "child.yaml:2: unknown key sed, did you mean seed?",
    ]


def test_bases_that_cannot_be_had():
    assert found(write("a.yaml", "extends: a.yaml\n")) == [
        "a.yaml:1: extends: a circle: a.yaml -> a.yaml"
    ]
    write("c.yaml", "extends: b.yaml\n")
    assert found(write("b.yaml", "seed: 1\nextends: c.yaml\n")) == [
        "c.yaml:1: extends: a circle: b.yaml -> c.yaml -> b.yaml"
    ]
    (problem,) = found(write("d.yaml", "extends: gone\n"))
    assert problem.startswith("d.yaml:1: extends: no recipe 'gone'")
    for text in ("null", "[a, b]", "3"):
        assert found(write("e.yaml", f"extends: {text}\n")) == [
            "e.yaml:1: extends: must be the name or path of one recipe"
        ]


# --- overrides


def test_nothing_is_concluded_from_an_override_that_cannot_be_read():
    text = GOOD.replace("  cutoff: 1.75", "  granularity: segment")
    (problem,) = found(write("r.yaml", text), ["segmentation.cutoff=["])
    assert problem.startswith("--set segmentation.cutoff=[: not valid YAML")


def test_overrides_come_last_and_are_yaml():
    write("good.yaml", GOOD)
    overrides = [
        "ppo.kl_coef=0.02",
        "ppo.kl_coef=2e-2",
        "optimizer.betas=[0.8, 0.9]",
        "description=a=b",
        "segmentation={granularity: token, cutoff: null}",
        "data.prompts=x/y",
        " ppo.iterations =3",
    ]
    recipe = load_recipe("good.yaml", overrides)
    assert recipe.ppo.kl_coef == 0.02
    assert recipe.ppo.actor_learning_rate == 1e-6
    assert recipe.optimizer.betas == (0.8, 0.9)
    assert recipe.description == "a=b"
    assert recipe.segmentation.granularity == "token"
    assert recipe.data.prompts == (Source("x/y"),)
    assert recipe.ppo.iterations == 3


def test_an_override_may_create_and_remove_a_block():
    text = GOOD.replace("  path: org/model", "  dtype: auto")
    recipe = load_recipe(write("r.yaml", text), ["sandbox.phrases=5"])
    assert recipe.sandbox.phrases == 5
    write("s.yaml", GOOD + "sandbox: {}\n")
    assert load_recipe("s.yaml", ["sandbox=null"]).sandbox is None


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("ppo.kl_coeff=1", "unknown key ppo.kl_coeff, did you mean ppo.kl_coef?"),
        ("kl_coef=1", "unknown key kl_coef, did you mean ppo.kl_coef?"),
        ("seed.x=1", "seed: must be an integer, not a mapping"),
        ("ppo=3", "ppo: must be a block of settings, not the number 3"),
        ("ppo.gamma=", "ppo.gamma: must be a number, not null"),
        ("ppo.gamma=[", "not valid YAML: while parsing a flow node, expected the node content"),
        ("ppo.gamma=!!python/tuple [1]", "tags (tag:yaml.org,2002:python/tuple) are not allowed"),
        ("ppo..gamma=1", "must be KEY=VALUE, for example --set ppo.kl_coef=0.02"),
        ("=1", "must be KEY=VALUE, for example --set ppo.kl_coef=0.02"),
    ],
)
def test_a_wrong_override_is_quoted(override: str, problem: str):
    (text,) = found(write("good.yaml", GOOD), [override])
    assert text.startswith(f"--set {override}: {problem}")


def test_other_options_are_named_and_taken_literally():
    write("good.yaml", GOOD)
    (problem,) = found("good.yaml", [Override("--model ./m", "model.path", "./m")])
    assert problem == "--model ./m: model.path: no such file or folder: ./m"
    (problem,) = found("good.yaml", [Override("--data ./d", "data.prompts", ["./d"])])
    assert problem == "--data ./d: data.prompts[0].path: no such file or folder: ./d"
    odd = write("a: {b", "")
    recipe = load_recipe("good.yaml", [Override("--data", "data.prompts", [f"./{odd}"])])
    assert recipe.data.prompts == (Source("./a: {b"),)


def test_a_sandbox_recipe_may_name_data_of_its_own():
    write("r.yaml", "sandbox: {}\nsegmentation: {cutoff: 1}\n")
    assert load_recipe("r.yaml").sandbox is not None
    recipe = load_recipe("r.yaml", ["data.prompts=c/d"])
    assert recipe.data.prompts == (Source("c/d"),)
