"""The page for those who come from other toolkits: its recipes load, its fields exist."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from denserl_cli.app import app
from tests import ROOT, markdown

PAGE = ROOT / "docs" / "coming-from.md"
RECIPES = {text.split()[1]: text for text in markdown.blocks(PAGE, "yaml")}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    plain = {"prompt": "What?", "chosen": "This.", "rejected": "That."}
    named = {"question": "What?", "good": "This.", "bad": "That."}
    for name, text in RECIPES.items():
        Path(name).write_text(text)
    Path("prompts.jsonl").write_text((json.dumps({"prompt": "What?"}) + "\n") * 1100)
    Path("pairs.jsonl").write_text((json.dumps(plain | named) + "\n") * 400)


def test_every_command_runs_as_printed_on_the_recipe_above_it():
    shown = markdown.commands(PAGE)
    assert {words[words.index("--recipe") + 1] for words in shown} == set(RECIPES)
    for words in shown:
        assert "--dry-run" in words
        result = CliRunner().invoke(app, words[1:])
        assert result.exit_code == 0, f"{shlex.join(words)}: {result.output} {result.exception!r}"


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_valid(name: str):
    result = CliRunner().invoke(app, ["validate", name])
    assert result.exit_code == 0, result.output


def test_every_field_of_ours_exists():
    reference = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    known = set(re.findall(r"^\| `([a-z_.]+)`", reference, re.MULTILINE))
    known |= {field.replace("reward_model.engine", "ppo.engine") for field in known}
    known |= {f"{field.rpartition('.')[0]}" for field in known}
    rows = re.findall(r"^\| .+ \| (.+) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    named = {
        field for row in rows for field in re.findall(r"`([a-z_]+(?:\.[a-z_]+)+)(?:: [^`]*)?`", row)
    }
    assert len(named) > 60
    assert named - known - {"rollout.n"} == set()
