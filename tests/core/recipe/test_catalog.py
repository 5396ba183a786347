from pathlib import Path

import pytest

from denserl_cli.core.errors import DenserlError
from denserl_cli.core.recipe import catalog


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with two recipes; the current directory is an empty one beside it."""
    package, recipes, here = (tmp_path / name for name in ("package", "recipes", "here"))
    for folder in (package, recipes, here):
        folder.mkdir()
    for name in ("phi3-token", "phi3-segment"):
        (recipes / f"{name}.yaml").write_text("{}")
    monkeypatch.setattr(catalog, "_PACKAGE", package)
    monkeypatch.chdir(here)
    return recipes


def test_recipes_are_beside_the_package_or_in_it(shipped: Path):
    assert catalog.recipes_folder() == shipped
    installed = shipped.parent / "package" / "shipped_recipes"
    installed.mkdir()
    assert catalog.recipes_folder() == installed


def test_names_are_listed_in_order(shipped: Path):
    assert catalog.list_recipes() == ["phi3-segment", "phi3-token"]


def test_a_shipped_name_comes_before_a_path(shipped: Path):
    Path("phi3-token").write_text("{}")
    Path("mine.yaml").write_text("{}")
    assert catalog.find_recipe("phi3-token") == shipped / "phi3-token.yaml"
    assert catalog.find_recipe("./phi3-token") == Path("phi3-token")
    assert catalog.find_recipe("mine.yaml") == Path("mine.yaml")
    assert catalog.find_recipe("mine.yaml", Path.cwd()) == Path.cwd() / "mine.yaml"


def test_a_name_that_is_nowhere_lists_its_neighbours(shipped: Path):
    with pytest.raises(DenserlError, match="no recipe 'phi3-segmnt'") as caught:
        catalog.find_recipe("phi3-segmnt")
    assert caught.value.hint.startswith("did you mean phi3-segment? `denserl recipes list`")
    with pytest.raises(DenserlError, match="no recipe ''"):
        catalog.find_recipe("")
    for odd in ("~nobody-of-this-name/x.yaml", "x" * 5000, "a\0b"):
        with pytest.raises(DenserlError, match="no recipe"):
            catalog.find_recipe(odd)
