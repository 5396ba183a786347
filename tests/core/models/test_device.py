"""What `model.dtype: auto` is: decided by a measurement, once for a run."""

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from denserl_cli.core import precision
from denserl_cli.core.models.device import compute_dtype, settled_dtype
from denserl_cli.core.recipe import load_recipe
from denserl_cli.core.recipe.schema import ModelConfig
from denserl_cli.core.runs.folder import RunFolder
from denserl_cli.core.scoring.resolve import with_settled_dtype
from tests import tiny


def measures(monkeypatch: pytest.MonkeyPatch, seconds: dict[torch.dtype, float]) -> None:
    """Let this machine take so many seconds for a product."""
    precision.bfloat16_is_fast.cache_clear()
    monkeypatch.setattr(precision, "seconds_of_a_product", seconds.__getitem__)


FAST = {torch.float32: 2.0, torch.bfloat16: 1.0}
SLOW = {torch.float32: 1.0, torch.bfloat16: 10.0}
ALIKE = {torch.float32: 1.0, torch.bfloat16: 0.9}


@pytest.fixture(autouse=True)
def measured_anew():
    yield
    precision.bfloat16_is_fast.cache_clear()


@pytest.fixture
def wide(tmp_path: Path) -> ModelConfig:
    LlamaConfig(hidden_size=256).save_pretrained(tmp_path / "wide")
    return ModelConfig(path=str(tmp_path / "wide"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU decides by what it has")
def test_auto_is_bfloat16_where_the_cpu_is_fast_at_it(
    wide: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for seconds, expected in ((FAST, "bfloat16"), (SLOW, "float32"), (ALIKE, "float32")):
        measures(monkeypatch, seconds)
        assert settled_dtype(wide) == expected
    measures(monkeypatch, FAST)
    LlamaConfig(hidden_size=64).save_pretrained(tmp_path / "narrow")
    assert settled_dtype(ModelConfig(path=str(tmp_path / "narrow"))) == "float32"
    assert settled_dtype(ModelConfig(path=str(tmp_path / "absent"))) == "float32"
    assert settled_dtype(ModelConfig(path="absent", dtype="float32")) == "float32"
    assert settled_dtype(ModelConfig(path="absent", dtype="bfloat16")) == "bfloat16"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU decides by what it has")
def test_a_run_keeps_what_its_first_command_decided(
    wide: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    recipe = load_recipe("phi3-segment", ["--set", f"model.path={wide.path}"][1:])
    assert recipe.model.dtype == "auto"
    measures(monkeypatch, FAST)
    run = RunFolder(tmp_path / "run", recipe)
    assert with_settled_dtype(recipe, run).model.dtype == "bfloat16"
    run.path.mkdir()
    run.claim()
    assert json.loads((run.path / "run.json").read_text())["dtype"] == "bfloat16"
    measures(monkeypatch, SLOW)  # it goes on elsewhere
    again = RunFolder(run.path, recipe)
    assert with_settled_dtype(recipe, again).model.dtype == "bfloat16"
    assert with_settled_dtype(recipe, RunFolder(tmp_path / "new", recipe)).model.dtype == "float32"


def test_the_embedded_task_is_not_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    measures(monkeypatch, {})
    recipe = tiny.recipe()
    assert with_settled_dtype(recipe, RunFolder(tmp_path, recipe)) is recipe
    if not torch.cuda.is_available():
        assert compute_dtype(recipe.model) is torch.float32


def test_the_measurement_is_one_of_this_machine():
    assert isinstance(precision.bfloat16_is_fast(), bool)
    assert precision.seconds_of_a_product(torch.float32) > 0


@pytest.mark.skipif(not precision.bfloat16_is_fast(), reason="this CPU is slow at bfloat16")
def test_products_of_bfloat16_numbers_are_those_of_float32():
    torch.manual_seed(0)
    left, right = torch.randn(2, 64, 64).bfloat16().float().unbind()
    expected = left @ right
    with precision.bfloat16_products(True):
        found = left @ right
        rounded = (left + 2**-10) @ right  # no bfloat16 numbers any more
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    exact = (left + 2**-10) @ right  # the setting is back
    torch.testing.assert_close(exact, (left.double() + 2**-10) @ right.double(), rtol=1e-4,
                               atol=1e-4, check_dtype=False)  # fmt: skip
    assert (rounded - exact).abs().max() > 1e-3
