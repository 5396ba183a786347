"""train-rm, fit-function and train-ppo: options to recipe and launch."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from denserl_cli.app import app
from denserl_cli.commands.common import read_recipe
from denserl_cli.core.errors import DenserlError, RecipeError
from denserl_cli.core.recipe.schema import Source
from denserl_cli.launch import launcher as launch
from denserl_cli.launch.processes import Processes

ONE = {"processes": Processes()}
TEXT = """\
model: {path: org/model}
segmentation: {cutoff: 1.0}
data:
  preferences: a/pairs
  evaluation: a/held-out
  prompts: a/prompts
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    Path("r.yaml").write_text(TEXT)
    return tmp_path


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    record: list[tuple] = []
    monkeypatch.setattr(launch, "launch", lambda *words, **options: record.append((words, options)))
    return record


def denserl(*words: str):
    return CliRunner().invoke(app, words)


@pytest.mark.parametrize("stage", ["train-rm", "fit-function", "train-ppo"])
def test_a_stage_is_launched_with_its_recipe(stage: str, launched):
    assert denserl(stage, "--recipe", "r.yaml", "--set", "seed=7").exit_code == 0
    ((words, options),) = launched
    assert (words[0], words[1].name, words[1].seed) == (stage, "r", 7)
    assert options == {"out": None, "mode": "start", "dry_run": False, **ONE}


def test_folder_mode_and_dry_run_are_passed_on(launched):
    denserl("train-rm", "-r", "r.yaml", "--out", "x", "--resume")
    denserl("train-rm", "-r", "r.yaml", "-o", "x", "--fresh", "--dry-run")
    assert [options for _, options in launched] == [
        {"out": Path("x"), "mode": "resume", "dry_run": False, **ONE},
        {"out": Path("x"), "mode": "fresh", "dry_run": True, **ONE},
    ]


def test_data_and_model_replace_those_of_the_recipe(launched):
    for stage in ("train-rm", "fit-function", "train-ppo"):
        denserl(stage, "-r", "r.yaml", "--data", "b/new", "--model", "org/other")
    reward, fit, ppo = (words[1] for words, _ in launched)
    new = (Source("b/new"),)
    assert (reward.data.preferences, reward.data.evaluation) == (new, ())
    assert (fit.data.preferences, fit.data.evaluation) == (new, (Source("a/held-out"),))
    assert (ppo.data.preferences, ppo.data.prompts) == ((Source("a/pairs"),), new)
    assert {reward.model.path, fit.model.path, ppo.model.path} == {"org/other"}


def test_set_has_the_last_word(launched):
    denserl("train-rm", "-r", "r.yaml", "--data", "b/new", "--set", "data.evaluation=b/eval")
    ((words, _),) = launched
    assert words[1].data.evaluation == (Source("b/eval"),)


def test_a_wrong_option_is_named(launched):
    result = denserl("train-ppo", "-r", "r.yaml", "--data", "gone.jsonl", "--model", "./gone")
    assert isinstance(result.exception, RecipeError)
    assert result.exception.problems == (
        "--data gone.jsonl: data.prompts[0].path: no such file or folder: gone.jsonl",
        "--model ./gone: model.path: no such file or folder: ./gone",
    )
    assert launched == []


@pytest.mark.parametrize(
    ("stage", "block"),
    [("train-rm", "preferences"), ("fit-function", "preferences"), ("train-ppo", "prompts")],
)
def test_a_stage_without_data_says_how_to_name_some(stage: str, block: str, launched):
    result = denserl(stage, "-r", "r.yaml", "--set", f"data.{block}=[]")
    assert isinstance(result.exception, DenserlError)
    assert result.exception.message == f"recipe r names no data.{block}, which {stage} needs"
    assert "--data" in result.exception.hint
    assert launched == []


def test_segment_may_go_without_data():
    assert read_recipe("segment", "r.yaml", ["data.preferences=[]"]).data.preferences == ()
    assert read_recipe("segment", "r.yaml", None, data="b/c").data.preferences == (Source("b/c"),)


def test_a_sandbox_brings_its_data(launched):
    Path("s.yaml").write_text("sandbox: {}\nsegmentation: {granularity: token}\n")
    assert denserl("train-ppo", "-r", "s.yaml").exit_code == 0
    assert len(launched) == 1


def test_a_dry_run_shows_the_plan_and_writes_nothing(here: Path):
    result = denserl("train-rm", "-r", "r.yaml", "--dry-run", "--out", "x")
    assert result.exit_code == 0
    assert f"# run folder: {here / 'x'}" in result.output
    assert "micro 8 × accumulation 16 × ranks 1 = global 128" in result.output
    assert [path.name for path in here.iterdir()] == ["r.yaml"]
