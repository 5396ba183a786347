"""Every command that the README shows does what it says there, on the tiny sandbox."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from denserl_cli.app import app
from tests import ROOT, markdown, tiny

PAGE = ROOT / "README.md"
OTHERS = ("make", "pip", "source")


def small(words: list[str]) -> list[str]:
    """The same command on the tiny sandbox; on a model that is not here, its plan."""
    name = words[0]
    if (
        name in ("init", "recipes", "validate", "plan", "report", "doctor", "data")
        or "--dry-run" in words
        or "--help" in words
    ):
        return words
    if name != "demo" and not any(word.startswith("sandbox-segment") for word in words):
        return [*words, "--dry-run"]
    return [*words, *tiny.words()]


def test_every_denserl_command_runs_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("pairs.jsonl").write_text('{"prompt": "q", "chosen": "a", "rejected": "b"}\n')
    printed = [words[1:] for words in markdown.commands(PAGE) if words[0] == "denserl"]
    assert len(printed) >= 10
    for words in printed:
        result = CliRunner().invoke(app, small(words))
        assert result.exit_code == 0, f"denserl {shlex.join(words)}: {result.exception!r}"


def test_the_page_shows_every_command_that_trains():
    shown = {words[1] for words in markdown.commands(PAGE) if words[0] == "denserl"}
    assert shown >= {"train-rm", "fit-function", "train-ppo", "segment", "export"}


def test_every_other_command_is_one_that_is_known():
    others = [words for words in markdown.commands(PAGE) if words[0] != "denserl"]
    assert {words[0] for words in others} <= set(OTHERS)
    rules = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    targets = [words[1] for words in others if words[0] == "make"]
    assert targets[:2] == ["demo", "test"] and set(targets) <= set(rules)
    files = [word for words in others for word in words if word.endswith(".txt")]
    assert all((ROOT / file).exists() for file in files)


def test_every_import_exists():
    (code,) = markdown.blocks(PAGE, "python")
    imports = re.findall(r"^from (\S+) import (.+)$", code, re.MULTILINE)
    assert len(imports) == len(code.strip().splitlines())
    for module, names in imports:
        for name in names.split(", "):
            assert callable(getattr(importlib.import_module(module), name))


DOCS = sorted((ROOT / "docs").glob("*.md"))


@pytest.mark.parametrize("page", [PAGE, *DOCS], ids=lambda page: page.name)
def test_every_linked_file_exists(page: Path):
    assert markdown.dead_links(page) == []


def test_every_page_is_listed_and_leads_back():
    text = PAGE.read_text(encoding="utf-8")
    listed = text[text.index("## Documentation") :]
    for page in DOCS:
        assert f"](docs/{page.name})" in listed, page.name
        assert "](../README.md)" in page.read_text(encoding="utf-8"), page.name
