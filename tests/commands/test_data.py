"""`denserl data` and `denserl validate` as a user runs them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from denserl_cli.app import app
from denserl_cli.core.data import sources
from denserl_cli.core.errors import DenserlError

PAIRS = [{"prompt": f"q{n}", "chosen": "a", "rejected": "b"} for n in range(4)]
RECIPE = (
    "model: {path: owner/name}\nsegmentation: {cutoff: 1.0}\ndata: {preferences: pairs.jsonl}\n"
)


def denserl(*words: str, **options: Any) -> Result:
    return CliRunner().invoke(app, list(words), **options)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "pairs.jsonl", PAIRS)
    (tmp_path / "mine.yaml").write_text(RECIPE)
    return tmp_path


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_file_is_described_in_words_and_in_json(here: Path) -> None:
    shown, told = denserl("data", "pairs.jsonl"), denserl("data", "pairs.jsonl", "--json")
    assert shown.exit_code == told.exit_code == 0, shown.exception
    for line in ("pairs.jsonl: 4 rows", "layout: plain", "usable: 4 pairs of 4 prompts"):
        assert line in shown.stdout.splitlines()
    assert json.loads(told.stdout)[0]["usable"] == 4


def test_the_mapping_of_a_format_is_printed_and_can_be_pasted(here: Path) -> None:
    rows = [{"system": "s", "question": "q", "chosen": "a", "rejected": "b"}]
    write(here / "orca.jsonl", rows)
    shown = denserl("data", "orca.jsonl").stdout
    assert "looks like orca-dpo and is read so here; set format: orca-dpo" in shown
    pasted = "\n".join(f"    {line}" for line in shown.split("may change:\n")[1].splitlines()[:5])
    recipe = RECIPE.partition("data:")[0] + "data:\n  preferences:\n    path: orca.jsonl\n"
    (here / "mine.yaml").write_text(recipe + pasted.replace("      ", "    ", 1))
    assert denserl("validate", "mine.yaml").exit_code == 0


def test_standard_input_is_read(here: Path) -> None:
    sources._standard_input.cache_clear()
    lines = "".join(json.dumps(row) + "\n" for row in PAIRS)
    result = denserl("data", "-", input=lines)
    assert "usable: 4 pairs of 4 prompts" in result.stdout, result.exception
    sources._standard_input.cache_clear()


def test_what_cannot_be_looked_at_is_an_error(here: Path) -> None:
    for words, message in (
        ((), "nothing to look at"),
        (("pairs.jsonl", "--format", "orca"), "did you mean orca-dpo"),
        (("none.jsonl",), "no such file"),
        (("https://example.org/rows.jsonl",), "addresses are not read here"),
    ):
        error = denserl("data", *words).exception
        assert isinstance(error, DenserlError) and message in str(error)


def test_validate_looks_at_the_first_rows(here: Path) -> None:
    assert denserl("validate", "mine.yaml").output == "mine: ok\n"
    write(here / "pairs.jsonl", [{"query": "q", "chosen": "a", "rejected": "b"}])
    error = denserl("validate", "mine.yaml").exception
    assert isinstance(error, DenserlError)
    assert "data.preferences[0]: none of the first rows" in error.message
    fixed = "data.preferences=[{path: pairs.jsonl, columns: {prompt: query}}]"
    assert denserl("validate", "mine.yaml", "--set", fixed).exit_code == 0


def test_every_problem_of_a_mapping_is_told_at_once(here: Path) -> None:
    source = """{path: pairs.jsonl, format: orca, ties: no, roles: {x: robot}, group_by: id,
      columns: {answers: "a[", better: b, scores: c, better_values: {up: best}, prompts: q}}"""
    error = denserl("validate", "mine.yaml", "--set", f"data.preferences=[{source}]").exception
    assert isinstance(error, DenserlError)
    for part in ("did you mean orca-dpo", "ties: must be", "columns.prompts, did you mean"):
        assert part in error.message
    source = """{path: pairs.jsonl, roles: {x: robot}, group_by: id, columns: {answers: "a[",
      better: b, scores: c, better_values: {up: best}}}"""
    error = denserl("validate", "mine.yaml", "--set", f"data.preferences=[{source}]").exception
    assert isinstance(error, DenserlError)
    for part in (
        "roles.x: must be system, user or assistant, not 'robot'",
        "group_by: rows with one answer each need columns.answers, and scores or rank",
        "columns.answers: 'a[' is not a column or a path",
        "columns: answers need better, scores or rank, one of them; found better and scores",
        "better_values: up: must be first, second, tie or skip, not 'best'",
    ):
        assert part in error.message
