"""The tutorial from its first line to its last, with a tiny model in place of the one it names."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from denserl_cli.app import app
from tests import ROOT, markdown, tiny
from tests.core.fake_tokenizers import byte_tokenizer

PAGE = ROOT / "docs" / "tutorial.md"
SMALL = (
    "model.path=./tiny",
    "reward_model.micro_batch_size=32",
    "normalizer.batch_size=40",
    "normalizer.pairs=40",
    "ppo.iterations=2",
    "ppo.rollout.batch_size=8",
    "ppo.train_batch_size=8",
    "ppo.rollout.max_new_tokens=16",
    "data.eval_prompts=2",
    "data.preferences=[{path: pairs.jsonl, max_samples: 96, columns: {prompt: question, "
    "chosen: good, rejected: bad}}]",
)
"""What makes the page's recipe a matter of seconds; the format of its data is the page's own."""


def make_model(folder: Path) -> None:
    tokenizer = byte_tokenizer(eos_token="<end>", pad_token="<pad>")
    model = tiny.causal_lm(vocabulary=len(tokenizer), hidden=16, layers=1)
    model.config.max_position_embeddings = 512
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def small(words: list[str]) -> list[str]:
    if words[0] in ("validate", "status", "report"):
        return words
    return [*words, *(word for setting in SMALL for word in ("--set", setting))]


def test_every_step_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_data, use = markdown.blocks(PAGE, "python")
    (recipe,) = markdown.blocks(PAGE, "yaml")
    exec(make_data, {})
    Path("my-recipe.yaml").write_text(recipe)
    make_model(Path("tiny"))
    shown = [words[1:] for words in markdown.commands(PAGE)]
    assert {"data", "train-rm", "fit-function", "train-ppo", "export"} <= {w[0] for w in shown}
    for words in shown:
        result = CliRunner().invoke(app, small(words))
        assert result.exit_code == 0, f"{shlex.join(words)}: {result.output} {result.exception!r}"
    assert Path("segments.html").exists() and Path("runs/my-recipe/report.html").exists()
    exec(use, {})


def test_every_linked_page_exists():
    assert markdown.dead_links(PAGE) == []
