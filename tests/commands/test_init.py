"""denserl init: a recipe that loads, whatever model, data, granularity and number of GPUs."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from denserl_cli.app import app
from denserl_cli.core.errors import DenserlError
from denserl_cli.core.planning.workload import check_batches, workload
from denserl_cli.core.recipe import load_recipe
from denserl_cli.core.recipe.json_schema import MARK


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs: #1.jsonl").touch()
    return tmp_path


def init(*words: str, answers: str | None = None):
    return CliRunner().invoke(app, ["init", *words], input=answers)


@pytest.mark.parametrize("granularity", ["segment", "token", "bandit"])
@pytest.mark.parametrize("gpus", [1, 3, 8, 48])
def test_every_choice_loads_and_is_shared_by_the_gpus(granularity: str, gpus: int):
    words = ("--model", "a/b", "--data", "c/d", "--granularity", granularity, "--gpus", str(gpus))
    assert init("r.yaml", *words).exit_code == 0
    recipe = load_recipe("r.yaml")
    assert (recipe.model.path, recipe.segmentation.granularity) == ("a/b", granularity)
    assert recipe.data.preferences == recipe.data.prompts
    for stage in ("train-rm", "fit-function", "train-ppo"):
        check_batches(stage, recipe, gpus)
    assert CliRunner().invoke(app, ["validate", "r.yaml"]).output == "r: ok\n"


def test_odd_names_are_quoted():
    assert init("my recipe.yaml", "--model", "a/b", "--data", "pairs: #1.jsonl").exit_code == 0
    assert load_recipe("my recipe.yaml").data.preferences[0].path == "pairs: #1.jsonl"
    assert "denserl train-rm     --recipe 'my recipe.yaml'" in Path("my recipe.yaml").read_text()


def test_a_known_backbone_brings_what_its_template_needs():
    init("r.yaml", "--model", "Qwen/Qwen3-8B", "--data", "c/d")
    recipe, shipped = load_recipe("r.yaml"), load_recipe("qwen3-segment")
    assert recipe.chat == shipped.chat
    assert recipe.recorded.parameters is None  # the sizes are those of the shipped model
    init("same.yaml", "--model", shipped.model.path, "--data", "c/d")
    assert load_recipe("same.yaml").recorded.parameters == shipped.recorded.parameters
    init("other.yaml", "--model", "Qwen/Qwen3-4B-Instruct-2507", "--data", "c/d")
    assert load_recipe("other.yaml").chat.template_arguments == {}


def test_the_first_line_names_a_schema_that_is_there():
    init("r.yaml", "--model", "a/b", "--data", "c/d")
    first = Path("r.yaml").read_text().splitlines()[0]
    assert first.startswith(f"{MARK}file://")
    assert Path(first.removeprefix(f"{MARK}file://")).is_file()


def test_columns_that_are_not_known_are_told_at_once():
    Path("pairs.csv").write_text("question,good,bad\nWhy?,So.,No.\n")
    result = init("r.yaml", "--model", "a/b", "--data", "pairs.csv")
    assert result.exit_code == 0 and result.stdout.endswith("then: denserl validate r.yaml\n")
    pairs, prompts = result.stderr.splitlines()
    assert pairs.startswith("to be mended in r.yaml: data.preferences[0]: none of the first rows")
    assert "columns: {prompt: QUESTION, chosen: BETTER, rejected: WORSE}" in pairs
    assert prompts.startswith("to be mended in r.yaml: data.prompts[0]")
    Path("pairs.csv").write_text("prompt,chosen,rejected\nWhy?,So.,No.\n")
    assert init("good.yaml", "--model", "a/b", "--data", "pairs.csv").stderr == ""


def test_what_is_not_said_is_asked_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("denserl_cli.commands.init._can_ask", lambda: True)
    assert init("r.yaml", answers="a/b\nc/d\n\nhalf\ntoken\n0\n2\n").exit_code == 0
    recipe = load_recipe("r.yaml")
    assert (recipe.model.path, recipe.data.prompts[0].path) == ("a/b", "c/d")
    assert (recipe.segmentation.granularity, recipe.recorded.gpus) == ("token", 2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("r.yaml",), "init needs --model and --data"),
        (("r.yaml", "--model", "a/b"), "init needs --data"),
        (("r.txt", "--model", "a/b", "--data", "c/d"), "r.txt: a recipe is a YAML file"),
        (("r.yaml", "--model", "a/b", "--data", "gone.jsonl"), "no such file or folder: gone"),
    ],
)
def test_what_is_refused_writes_nothing(words: tuple[str, ...], message: str, here: Path):
    before = sorted(here.iterdir())
    result = init(*words)
    assert isinstance(result.exception, DenserlError)
    assert message in result.exception.message and str(here) not in result.exception.message
    assert sorted(here.iterdir()) == before


def test_nothing_is_written_over():
    Path("r.yaml").write_text("precious")
    result = init("r.yaml", "--model", "a/b", "--data", "c/d")
    assert result.exception.message == "r.yaml exists already"
    assert Path("r.yaml").read_text() == "precious"


@pytest.mark.parametrize(("rows", "gpus"), [(12, 1), (90, 1), (200, 2), (5000, 8)])
def test_batches_fit_the_rows_of_a_local_file(rows: int, gpus: int):
    pair = {"prompt": "Q", "chosen": "yes", "rejected": "no"}
    lines = [json.dumps({**pair, "prompt": f"Q{number}"}) + "\n" for number in range(rows)]
    Path("own.jsonl").write_text("".join(lines))
    assert init("r.yaml", "--model", "a/b", "--data", "own.jsonl", "--gpus", str(gpus)).output
    recipe = load_recipe("r.yaml")
    for stage in ("train-rm", "fit-function", "train-ppo"):
        check_batches(stage, recipe, gpus)
    if rows > 12:  # there is no batch of the responses of 11 prompts
        steps = {stage: workload(stage, recipe).steps for stage in ("train-rm", "train-ppo")}
        assert steps["train-rm"].total >= (8 if rows < 2000 else 1)
        assert steps["train-ppo"].total >= 1
