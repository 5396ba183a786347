"""denserl evaluate: options, what is printed and where the result goes."""

from __future__ import annotations

import json
import re
import shlex
from itertools import islice
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from denserl_cli.app import app
from denserl_cli.commands.evaluate import Benchmark
from denserl_cli.core.errors import DenserlError
from denserl_cli.core.evaluation.benchmarks import FORMATS, RANKED
from tests import ROOT, tiny
from tests.core.evaluation.test_benchmark_scores import ROWS

PROMPT = "write calm words about rivers"


def evaluate(what: str, folder: Path, *words: str) -> Result:
    command = ["evaluate", what, "-r", "sandbox-segment", "-o", str(folder), *tiny.words(), *words]
    return CliRunner().invoke(app, command)


@pytest.fixture
def bench(tmp_path: Path) -> Path:
    """A file as RewardBench has it."""
    file = tmp_path / "bench.v1.jsonl"
    row = {"prompt": PROMPT, "chosen": "bala dare fabo", "rejected": "pata pata", "id": 1}
    subsets = ("donotanswer", "hep-go", "mine")
    file.write_text("".join(json.dumps({**row, "subset": name}) + "\n" for name in subsets))
    return file


def test_the_held_out_pairs(scored: Path):
    result = evaluate("rm", scored, "--json")
    assert result.exit_code == 0, result.exception
    assert json.loads(result.stdout)["held_out"] is True
    assert (scored / "evaluation" / "rm-held-out.json").exists()


def test_the_benchmarks_format(scored: Path, bench: Path):
    result = evaluate("rm", scored, "--data", str(bench), "--json")
    assert result.exit_code == 0, result.exception
    found = json.loads(result.stdout)
    assert found["sections"].keys() == {"Safety", "Reasoning"}
    assert json.loads((scored / "evaluation" / "rm-bench.v1.json").read_text()) == found
    named = evaluate("rm", scored, "--data", str(bench), "--benchmark", "reward-bench")
    assert named.exit_code == 0, named.exception
    assert (scored / "evaluation" / "rm-reward-bench.json").exists()
    for word in ("accuracy", "ties", "calibration", "by length", "donotanswer", "Safety", "other"):
        assert word in named.stdout
    (absent,) = [line for line in named.stdout.splitlines() if "subsets that are absent" in line]
    assert absent.split()[-1] == str(len(found["absent_subsets"]))


@pytest.mark.parametrize("name", RANKED)
def test_a_benchmark_with_its_own_metrics(name: str, scored: Path, tmp_path: Path):
    file = tmp_path / "b.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS[name]()))
    words = ("--data", str(file), "--benchmark", name)
    result = evaluate("rm", scored, *words, "--json")
    assert result.exit_code == 0, result.exception
    found = json.loads(result.stdout)
    assert json.loads((scored / "evaluation" / f"rm-{name}.json").read_text()) == found
    shown = evaluate("rm", scored, *words).stdout
    for word in (
        name,
        "score",
        "rows that are not counted",
        *(list(found["parts"][0].values())[:1]),
    ):
        assert str(word) in shown
    assert "not the official score" not in shown
    assert "not the official score" in evaluate("rm", scored, *words, "--limit", "2").stdout


def test_every_benchmark_is_offered():
    assert [str(name) for name in Benchmark] == list(FORMATS)


def test_a_policy(scored: Path):
    start = str(scored / "sandbox" / "model")
    result = evaluate("policy", scored, "--policy", start, "--n", "2", "--limit", "1", "--json")
    assert result.exit_code == 0, result.exception
    assert json.loads(result.stdout)["samples_per_prompt"] == 2
    shown = evaluate("policy", scored, "--policy", start, "--n", "2").stdout
    for word in ("rm_score", "dense_reward", "kl", "true_reward", "best of n", "kl_bound"):
        assert word in shown
    assert "the policy's mean rm_score equals that of best of 1.00" in shown


def test_other_prompts(scored: Path, tmp_path: Path):
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"prompt": PROMPT}) + "\n")
    start = str(scored / "sandbox" / "model")
    words = ("--policy", start, "--data", str(file), "--n", "1", "--json")
    result = evaluate("policy", scored, *words)
    assert result.exit_code == 0, result.exception
    assert json.loads(result.stdout)["prompts"] == 1


@pytest.mark.parametrize("what", ["rm", "policy"])
def test_a_limit_of_0_is_refused(what: str, scored: Path):
    result = evaluate(what, scored, "--limit", "0")
    assert result.exit_code == 2 and "--limit" in result.output


@pytest.mark.parametrize(
    ("what", "content", "message"),
    [
        ("rm", None, "no such file"),
        ("rm", "", "no rows in"),
        ("rm", "{broken\n", "bad.jsonl:1"),
        ("rm", '{"prompt": "a", "chosen": "b"}\n', "no usable row"),
        ("policy", "", "no rows in"),
        ("policy", "{}\n", "no usable row"),
    ],
)
def test_bad_data_is_one_message(
    what: str, content: str | None, message: str, scored: Path, tmp_path: Path
):
    file = tmp_path / "bad.jsonl"
    if content is not None:
        file.write_text(content)
    start = ["--policy", str(scored / "sandbox" / "model")] if what == "policy" else []
    result = evaluate(what, scored, "--data", str(file), *start)
    assert isinstance(result.exception, DenserlError), result.exception
    assert message in result.exception.message and result.exception.exit_code == 2
    assert not (scored / "evaluation").exists()


@pytest.mark.parametrize("what", ["rm", "policy"])
def test_before_anything_is_trained(what: str, tmp_path: Path):
    result = evaluate(what, tmp_path / "new")
    assert isinstance(result.exception, DenserlError)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("what", ["rm", "policy"])
def test_a_dry_run_writes_nothing(what: str, tmp_path: Path):
    result = evaluate(what, tmp_path / "new", "--dry-run")
    assert result.exit_code == 0 and result.stdout.startswith(f"# stage: evaluate {what}\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "data_set", "split"),
    [
        ("reward-bench", "allenai/reward-bench", "filtered"),
        ("reward-bench-2", "allenai/reward-bench-2", "test"),
        ("rm-bench", "THU-KEG/RM-Bench", "train"),
        ("judgebench", "ScalerLab/JudgeBench", "gpt"),
    ],
)
def test_the_benchmark_of_the_hub(name: str, data_set: str, split: str, tmp_path: Path):
    shown = evaluate("rm", tmp_path / "new", "--benchmark", name, "--dry-run").stdout
    assert f"path: {data_set}\n" in shown and f"split: {split}\n" in shown


def test_real_pairs(scored: Path, shared: Path, tmp_path: Path):
    """Every word is unknown to the sandbox's tokenizer; what is held is the length statistics."""
    file = tmp_path / "real.jsonl"
    with (shared / "data" / "preferences" / "eval.jsonl").open(encoding="utf-8") as lines:
        rows = list(islice(lines, 8))
    file.write_text("".join(rows), encoding="utf-8")
    limits = ("--set", "data.max_length=4096", "--set", "data.max_prompt_length=512")
    result = evaluate("rm", scored, "--data", str(file), "--json", *limits)
    assert result.exit_code == 0, result.exception
    found = json.loads(result.stdout)
    words = [
        [len(json.loads(row)[side][-1]["content"].split()) for side in ("chosen", "rejected")]
        for row in rows
    ]
    longer = sum(chosen > rejected for chosen, rejected in words)
    assert found["pairs"] == 8 and found["length"]["longer_accuracy"] == longer / 8


def test_the_commands_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    page = ROOT / "docs" / "evaluation.md"
    monkeypatch.chdir(tmp_path)
    for name in ("pairs", "reward-bench", "prompts"):
        Path(f"{name}.jsonl").touch()
    lines = re.findall(r"^denserl (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(lines) >= 7
    for line in lines:
        result = CliRunner().invoke(app, [*shlex.split(line), "--dry-run"])
        assert result.exit_code == 0, f"{line}: {result.exception!r}"
