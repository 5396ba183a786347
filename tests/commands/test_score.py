"""denserl score: files in, files out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from denserl_cli.app import app
from denserl_cli.core.errors import DenserlError
from denserl_cli.core.evaluation import score_responses
from tests import tiny

PROMPT = "write calm words about rivers"
TEXTS = ("bala dare fabo mago nanu pata", "mago nanu pata", "pata pata bala")


def score(folder: Path, *words: str, stdin: str | None = None) -> Result:
    command = ["score", "-r", "sandbox-segment", "-o", str(folder), *tiny.words(), *words]
    return CliRunner().invoke(app, command, input=stdin)


@pytest.fixture
def responses(tmp_path: Path) -> Path:
    file = tmp_path / "in.jsonl"
    rows = [{"id": n, "prompt": PROMPT, "response": text} for n, text in enumerate(TEXTS)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def read(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_the_command_and_the_call_agree(scored: Path, responses: Path, tmp_path: Path):
    result = score(scored, "--data", str(responses), "--to", str(tmp_path / "a" / "out.jsonl"))
    assert result.exit_code == 0, result.exception
    talks = [
        [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": text}]
        for text in TEXTS
    ]
    called = score_responses(tiny.recipe(), scored, talks)
    rows = read(tmp_path / "a" / "out.jsonl")
    assert [row["id"] for row in rows] == [0, 1, 2]
    assert [row["score"] for row in rows] == [one.score for one in called]
    for row, one in zip(rows, called, strict=True):
        names = ("text", "start", "end", "value", "reward")
        assert row["segments"] == [{n: getattr(s, n) for n in names} for s in one.segments]


def test_a_file_is_replaced_only_when_asked(scored: Path, responses: Path, tmp_path: Path):
    out = tmp_path / "out.jsonl"
    out.write_text("mine")
    words = ("--data", str(responses), "--to", str(out))
    result = score(scored, *words)
    assert isinstance(result.exception, DenserlError) and "--fresh" in result.exception.hint
    assert out.read_text() == "mine"
    assert score(scored, *words, "--fresh").exit_code == 0
    assert len(read(out)) == 3


def test_a_file_can_replace_itself(scored: Path, responses: Path):
    assert score(scored, "--data", str(responses), "--to", str(responses), "--fresh").exit_code == 0
    assert all("score" in row for row in read(responses))


def test_pipes(scored: Path, responses: Path, tmp_path: Path):
    result = score(scored, "--data", "-", "--to", "-", stdin=responses.read_text())
    assert result.exit_code == 0, result.exception
    score(scored, "--data", str(responses), "--to", str(tmp_path / "out.jsonl"))
    assert result.stdout == (tmp_path / "out.jsonl").read_text()


def test_an_interrupted_command_leaves_nothing(
    scored: Path, responses: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(
        "denserl_cli.core.inspection.inspector.Inspector.segment_encoded", interrupted
    )
    result = score(scored, "--data", str(responses), "--to", str(tmp_path / "out.jsonl"))
    assert result.exit_code != 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "scored"]


@pytest.mark.parametrize("content", ["", "\n", "{broken\n", '{"response": "x"}\n'])
def test_without_a_usable_row_nothing_is_written(content: str, scored: Path, tmp_path: Path):
    file = tmp_path / "in.jsonl"
    file.write_text(content)
    result = score(scored, "--data", str(file), "--to", str(tmp_path / "out.jsonl"))
    assert isinstance(result.exception, DenserlError), result.exception
    assert str(file) in result.exception.message and result.exception.exit_code == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "scored"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--data", "gone.jsonl", "--to", "out.jsonl"), "--data gone.jsonl: No such file"),
        (("--data", ".", "--to", "out.jsonl"), "--data .: Is a directory"),
        (("--data", "in.jsonl", "--to", "."), "--to . is a folder"),
    ],
)
def test_wrong_files_are_one_message(
    words: tuple[str, ...], message: str, scored: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(scored.parent)
    result = score(scored, *words)
    assert isinstance(result.exception, DenserlError)
    assert message in result.exception.message and result.exception.hint


def test_before_anything_is_trained(responses: Path, tmp_path: Path):
    result = score(tmp_path / "new", "--data", str(responses), "--to", str(tmp_path / "out.jsonl"))
    assert isinstance(result.exception, DenserlError)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl"]


def test_a_dry_run_writes_nothing(responses: Path, tmp_path: Path):
    result = score(tmp_path / "new", "--data", str(responses), "--to", "x", "--dry-run")
    assert result.exit_code == 0 and result.stdout.startswith("# stage: score\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl"]
