"""What is known of a recipe's files before anything is started."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from denserl_cli.core.data.local_rows import count_local_rows, first_rows_problems
from denserl_cli.core.errors import DenserlError
from denserl_cli.core.planning.dry_run import plan_lines
from denserl_cli.core.recipe import load_recipe
from denserl_cli.core.recipe.schema import Columns, DataConfig, Source

GOOD = {"prompt": "q", "chosen": "a", "rejected": "b"}


def write(path: Path, rows: list[dict[str, Any]]) -> Source:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Source(str(path))


def test_rows_are_counted_where_each_is_one_pair(tmp_path: Path) -> None:
    plain, listed = write(tmp_path / "a.jsonl", [GOOD] * 5), tmp_path / "b.json"
    listed.write_text(json.dumps([GOOD] * 3))
    assert count_local_rows([plain, Source(str(listed), weight=2)]) == 11
    assert count_local_rows([replace(plain, max_samples=2)]) == 2
    assert count_local_rows([replace(plain, format="orca-dpo")]) == 5
    for unknown in (
        Source("owner/name"),
        replace(plain, format="kto"),
        replace(plain, format="nectar"),
        replace(plain, format="oasst"),
        replace(plain, columns=Columns(chosen="chosen[*]")),
    ):
        assert count_local_rows([plain, unknown]) is None


def test_a_dry_run_counts_the_rows_of_files(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [GOOD] * 300)
    recipe = load_recipe("sandbox-segment")
    recipe = replace(recipe, data=replace(recipe.data, preferences=(source,)))
    lines = plan_lines("train-rm", recipe)
    assert any(line.startswith("pairs: 300 (rows, counted)") for line in lines)


def test_first_rows_are_looked_at_by_what_they_are_for(tmp_path: Path) -> None:
    recipe = load_recipe("sandbox-segment")
    question = [{"question": "what is it", "chosen": "a", "rejected": "b"}]
    bad, good = write(tmp_path / "bad.jsonl", question), write(tmp_path / "good.jsonl", [GOOD])
    prompts, empty = write(tmp_path / "p.jsonl", [{"prompt": "q"}]), tmp_path / "empty.jsonl"
    empty.write_text("")
    utf16 = tmp_path / "utf16.jsonl"
    utf16.write_text(json.dumps(GOOD), encoding="utf-16")
    data = DataConfig(
        preferences=(good, bad, Source("owner/name"), Source(str(empty))),
        evaluation=(replace(bad, columns=Columns(prompt="question")), Source(str(utf16))),
        prompts=(prompts, bad),
    )
    found = list(first_rows_problems(replace(recipe, data=data)))
    assert [problem.partition(": ")[0] for problem in found] == [
        "data.preferences[1]",
        "data.preferences[3]",
        "data.evaluation[1]",
        "data.prompts[1]",
    ]
    assert "{prompt: question}" in found[0] and "there are none" in found[1]
    assert "UTF-16" in found[2]


def test_a_broken_file_is_an_error_of_the_count(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[{")
    with pytest.raises(DenserlError, match="broken JSON"):
        count_local_rows([Source(str(tmp_path / "a.json"))])
