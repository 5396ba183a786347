from pathlib import Path

from denserl_cli.core.recipe import load_recipe
from denserl_cli.core.recipe.building import known_keys
from denserl_cli.core.recipe.reference import reference
from tests import ROOT

DOCS = ROOT / "docs" / "recipes.md"


def test_the_written_reference_is_current():
    command = "python -m denserl_cli.core.recipe.reference > docs/recipes.md"
    assert DOCS.read_text(encoding="utf-8") == reference(), f"run: {command}"


def test_every_field_is_in_the_reference_with_its_meaning():
    text = reference()
    rows = {line.split("`")[1]: line for line in text.splitlines() if line.startswith("| `")}
    fields = {key for key in known_keys() if not any(k.startswith(key + ".") for k in known_keys())}
    fields = {key.replace("ppo.engine.", "reward_model.engine.") for key in fields}
    assert fields <= set(rows)
    assert all(len(row.split("|")[4].strip()) > 5 for row in rows.values())


def test_types_and_defaults_are_shown():
    text = reference()
    assert "| `ppo.kl_target` | a number or null | `null` |" in text
    assert "| `optimizer.betas` | a list of 2 numbers | `[0.9, 0.95]` |" in text
    assert '| `segmentation.granularity` | segment, token or bandit | `"segment"` |' in text
    assert "| `…path` | text | required |" in text


def test_the_example_is_a_recipe(tmp_path: Path):
    example = reference().partition("```yaml\n")[2].partition("```")[0]
    path = tmp_path / "my-recipe.yaml"
    path.write_text(example)
    recipe = load_recipe(str(path))
    assert recipe.ppo.kl_coef == 0.02
    assert recipe.sandbox is not None
