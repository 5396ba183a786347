from pathlib import Path

import pytest
from typer.testing import CliRunner

from denserl_cli.app import app
from denserl_cli.core.errors import DenserlError
from denserl_cli.core.recipe import catalog, load_recipe

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
