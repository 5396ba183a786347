import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from denserl_cli.app import app
from denserl_cli.core.errors import DenserlError
from denserl_cli.core.recipe import catalog, load_recipe
from denserl_cli.core.recipe.json_schema import FILE, MARK, json_schema

TEXT = "# mine\ndescription: tiny one\nsandbox: {}\nsegmentation: {cutoff: 1.0}\n"


@pytest.fixture(autouse=True)
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two shipped recipes, and a current directory beside them."""
    recipes, here = tmp_path / "recipes", tmp_path / "here"
    recipes.mkdir()
    here.mkdir()
    (recipes / "tiny.yaml").write_text(TEXT)
    hub = "extends: tiny\nsandbox: null\nmodel: {path: org/model}\n"
    (recipes / "hub-token.yaml").write_text(
        hub + "segmentation: {granularity: token, cutoff: null}\n"
    )
    monkeypatch.setattr(catalog, "_PACKAGE", tmp_path / "package")
    monkeypatch.chdir(here)
    return recipes


def denserl(*words: str):
    return CliRunner().invoke(app, words)


def test_list_shows_what_each_recipe_is(shipped: Path):
    gated = "extends: hub-token\ndescription: big\nrecorded: {gpus: 8, gated: true}\n"
    (shipped / "hub-gated.yaml").write_text(gated)
    result = denserl("recipes", "list")
    rows = [line.split() for line in result.output.splitlines() if line.strip()]
    assert rows[0] == ["recipe", "granularity", "GPUs", "needs", "backbone", "and", "purpose"]
    assert rows[2] == ["hub-gated", "token", "8", "licence", "model:", "big"]
    assert rows[3] == ["hub-token", "token", "-", "hub", "model"]
    assert rows[4] == ["tiny", "segment", "-", "nothing", "sandbox:", "tiny", "one"]


def test_show_prints_a_recipe_that_loads_to_the_same():
    Path("copy.yaml").write_text(denserl("recipes", "show", "hub-token").output)
    assert load_recipe("copy.yaml") == load_recipe("hub-token")
    assert denserl("recipes", "show", "tiny", "--raw").output == TEXT


def test_list_as_json_says_the_same(shipped: Path):
    found = json.loads(denserl("recipes", "list", "--json").output)
    assert found == [
        {
            "name": "hub-token",
            "description": "",
            "granularity": "token",
            "model": "org/model",
            "gpus": None,
            "needs": "hub",
            "file": str(shipped / "hub-token.yaml"),
        },
        {
            "name": "tiny",
            "description": "tiny one",
            "granularity": "segment",
            "model": None,
            "gpus": None,
            "needs": "nothing",
            "file": str(shipped / "tiny.yaml"),
        },
    ]


def test_show_takes_overrides():
    shown = denserl("recipes", "show", "tiny", "--set", "ppo.gamma=0.5", "--set", "seed=1").output
    Path("copy.yaml").write_text(shown)
    recipe = load_recipe("copy.yaml")
    assert (recipe.ppo.gamma, recipe.seed) == (0.5, 1)
    result = denserl("recipes", "show", "tiny", "--raw", "--set", "seed=1")
    assert "--raw prints the file as written" in str(result.exception)


def test_a_copy_names_its_schema_by_a_path_that_holds_anywhere(shipped: Path):
    (shipped / "tiny.yaml").write_text(f"{MARK}{FILE}\n{TEXT}")
    denserl("recipes", "copy", "tiny", "mine.yaml")
    assert Path("mine.yaml").read_text() == f"{MARK}{(shipped / FILE).as_uri()}\n{TEXT}"


def test_schema_prints_what_editors_read():
    assert json.loads(denserl("recipes", "schema").output) == json_schema()


def test_copy_writes_a_file_and_never_over_one():
    assert denserl("recipes", "copy", "tiny", "mine.yaml").output == "copied to mine.yaml\n"
    assert Path("mine.yaml").read_text() == TEXT
    Path("mine.yaml").write_text("precious")
    result = denserl("recipes", "copy", "tiny", "mine.yaml")
    assert isinstance(result.exception, DenserlError)
    assert result.exception.message == "mine.yaml exists already"
    assert Path("mine.yaml").read_text() == "precious"
    denserl("recipes", "copy", "tiny", ".")
    assert Path("tiny.yaml").read_text() == TEXT
    result = denserl("recipes", "copy", "tiny", "no/such/folder.yaml")
    assert "cannot write no/such/folder.yaml" in str(result.exception)


def test_validate_says_ok_or_every_problem():
    assert denserl("validate", "tiny").output == "tiny: ok\n"
    result = denserl("validate", "tiny", "--set", "ppo.gama=1", "--set", "seed=-1")
    assert result.exception.problems == (
        "--set ppo.gama=1: unknown key ppo.gama, did you mean ppo.gamma?",
        "--set seed=-1: seed: must be zero or more, not -1",
    )
