"""denserl answer: its options, what it says, where its files go."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from denserl_cli.app import app, main
from denserl_cli.core.errors import DenserlError
from denserl_cli.core.observer import Observer
from denserl_cli.core.stages.run import run_stage
from tests import tiny

QUESTIONS = [
    {"question_id": n, "category": "math", "turns": ["write calm words about rivers", "again"]}
    for n in (7, 3, 5)
]


@pytest.fixture(scope="module")
def _finished(_scored: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(shutil.copytree(_scored, tmp_path_factory.mktemp("finished") / "run"))
    run_stage("train-ppo", tiny.recipe("ppo.iterations=1"), folder, "start", Observer())
    return folder


@pytest.fixture
def finished(_finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(_finished, tmp_path / "finished"))


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    file = tmp_path / "question.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    return file


def words(folder: Path, questions: Path, *more: str) -> list[str]:
    return [
        *("answer", "-r", "sandbox-segment", "-o", str(folder), "-b", "mt-bench"),
        *("--questions", str(questions), *tiny.words("ppo.iterations=1"), *more),
    ]


def run(folder: Path, questions: Path, *more: str) -> Result:
    return CliRunner().invoke(app, words(folder, questions, *more))


def test_the_runs_policy_answers_into_the_run_folder(finished: Path, questions: Path):
    result = run(finished, questions, "--max-new-tokens", "30")
    assert result.exit_code == 0, result.exception
    (target,) = (finished / "answers" / "mt-bench").glob("*.jsonl")
    assert re.fullmatch(r"sandbox-segment-[0-9a-f]{6}", target.stem)
    assert f"3 answers of {target.stem} are in {target}" in result.stdout
    rows = [json.loads(line) for line in target.read_text().splitlines()]
    assert [row["question_id"] for row in rows] == [7, 3, 5]
    assert {row["model_id"] for row in rows} == {target.stem}
    again = run(finished, questions, "--max-new-tokens", "30")
    assert again.exit_code == 0 and again.stdout == ""
    assert "finished; nothing to do (--fresh" in again.stderr


def test_the_options(finished: Path, questions: Path, tmp_path: Path):
    to = tmp_path / "elsewhere" / "b.jsonl"
    result = run(
        finished, questions, *("--to", str(to), "--policy", str(finished / "policy_best")),
        *("--generator", "mine-v1", "--limit", "2", "--max-new-tokens", "4"),
        *("--temperature", "0.5", "--batch-size", "1"),
    )  # fmt: skip
    assert result.exit_code == 0, result.exception
    rows = [json.loads(line) for line in to.read_text().splitlines()]
    assert [(row["question_id"], row["model_id"]) for row in rows] == [
        (7, "mine-v1"),
        (3, "mine-v1"),
    ]
    assert all(len(turn.split()) <= 4 for row in rows for turn in row["choices"][0]["turns"])
    assert not (finished / "answers").exists()


def test_the_start_model_of_a_new_run(questions: Path, tmp_path: Path):
    folder = tmp_path / "new"
    result = run(folder, questions, "--policy", "start", "--max-new-tokens", "4")
    assert result.exit_code == 0, result.exception
    (target,) = (folder / "answers" / "mt-bench").glob("*.jsonl")
    assert re.fullmatch(r"sandbox-segment-start-[0-9a-f]{6}", target.stem)
    assert (folder / "run.json").exists()  # still a run folder for the stages to come


def test_a_dry_run_leaves_nothing(questions: Path, tmp_path: Path):
    result = run(tmp_path / "new", questions, "--policy", "org/policy", "--limit", "2", "--dry-run")
    folder = tmp_path / "new" / "answers" / "mt-bench"
    assert re.fullmatch(
        "would answer 2 questions of mt-bench with org/policy, up to 1024 tokens each turn, as "
        rf"(policy-[0-9a-f]{{6}}), into {folder}/\1\.jsonl\n",
        result.stdout,
    )
    assert not (tmp_path / "new").exists()


def planned_name(folder: Path, questions: Path, *more: str) -> str:
    shown = run(folder, questions, "--dry-run", *more).stdout
    return shown.partition(", as ")[2].partition(", into ")[0]


def test_a_name_stands_for_what_makes_the_answers(finished: Path, questions: Path, tmp_path: Path):
    name = planned_name(finished, questions)
    assert name == planned_name(finished, questions, "--limit", "1", "--batch-size", "2")
    moved = Path(shutil.copytree(finished / "policy", tmp_path / "moved" / "sandbox-segment"))
    assert name == planned_name(finished, questions, "--policy", str(moved))
    arena = tmp_path / "arena.jsonl"
    row = {"uid": "u", "category": "arena-hard-v0.1", "prompt": "write calm words about rivers"}
    arena.write_text(json.dumps(row) + "\n")
    assert name == planned_name(finished, arena, "--benchmark", "arena-hard")
    others = (
        ("--temperature", "0.5"), ("--max-new-tokens", "9"), ("--set", "seed=7"),
        ("--policy", str(finished / "policy_best")), ("--policy", "start"),
    )  # fmt: skip
    changed = {planned_name(finished, questions, *words) for words in others}
    assert len(changed) == len(others) and name not in changed
    weights = moved / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1  # trained further
    weights.write_bytes(data)
    trained = planned_name(finished, questions, "--policy", str(moved))
    assert trained != name and trained.startswith("sandbox-segment-")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--generator", "a/b"], "--generator 'a/b'"),
        (["--generator", ""], "--generator ''"),
        (["--generator", ".hidden"], "--generator '.hidden'"),
        (["--generator", "a\nb"], "--generator 'a\\nb'"),
        (["--to", "QUESTIONS"], "is the question file"),
        (["--to", "answers.json"], "are a .jsonl file"),
        (["--temperature", "inf"], "--temperature inf"),
        (["--benchmark", "arena-hard"], "looks like mt-bench's question file"),
        (["--policy", "./gone"], "--policy ./gone: no such folder"),
    ],
)
def test_what_is_refused(more: list[str], message: str, questions: Path, tmp_path: Path):
    given = [str(questions) if word == "QUESTIONS" else word for word in more]
    result = run(tmp_path / "new", questions, "--policy", "start", *given)
    assert isinstance(result.exception, DenserlError), result.output
    assert message in result.exception.message and result.exception.hint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["question.jsonl"]


def test_a_run_without_a_policy(scored: Path, questions: Path):
    result = run(scored, questions)
    assert isinstance(result.exception, DenserlError)
    assert "has no policy" in result.exception.message
    assert "denserl train-ppo" in (result.exception.hint or "")


def test_a_policy_of_another_model_or_format_is_refused(finished: Path, questions: Path):
    for setting, message in (
        ("model.revision=other", 'model.revision was null, is "other"'),
        ("chat.stop_tokens=[w1]", 'chat.stop_tokens was [], is ["w1"]'),
        ("lora={rank: 2}", "lora.rank was null, is 2"),
    ):
        result = run(finished, questions, "--set", setting)
        assert isinstance(result.exception, DenserlError), setting
        assert message in result.exception.message
        assert "ppo" not in result.exception.message.partition("settings: ")[2]


def test_what_no_answer_depends_on_may_change(finished: Path, questions: Path):
    result = run(
        finished, questions, "--dry-run", "--set", "ppo.lam=0.5", "--set", "data.strict=true"
    )
    assert result.exit_code == 0, result.exception


def test_a_place_that_cannot_be_written_is_one_message(
    finished: Path, questions: Path, tmp_path: Path, monkeypatch, capsys
):
    (tmp_path / "file").write_text("")
    target = str(tmp_path / "file" / "a.jsonl")
    command = words(finished, questions, "--to", target, "--max-new-tokens", "4")
    monkeypatch.setattr(sys, "argv", ["denserl", *command])
    with pytest.raises(SystemExit) as caught:
        main()
    errors = capsys.readouterr().err
    assert caught.value.code == 2 and "Traceback" not in errors
    assert sum(line.startswith("error:") for line in errors.splitlines()) == 1
