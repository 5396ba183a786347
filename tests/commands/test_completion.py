"""What the Tab key proposes, by the way that shells ask for it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from denserl_cli.commands.completion import complete_recipe, complete_run
from tests import ROOT


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").touch()
    (tmp_path / "notes.txt").touch()
    for run in ("runs/first", "runs/second", "old/third"):
        (tmp_path / run).mkdir(parents=True)
        (tmp_path / run / "run.json").touch()
    return tmp_path


def proposed(words: str, here: Path) -> tuple[set[str], str]:
    """The proposals for the last word, and the modules that were imported for them."""
    program = (
        "import sys\nfrom denserl_cli.app import main\n"
        "try:\n    main()\nfinally:\n"
        "    heavy = {'torch', 'transformers', 'rich', 'numpy'} & set(sys.modules)\n"
        "    print(' '.join(heavy), file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=here,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "_DENSERL_COMPLETE": "complete_bash",
            "COMP_WORDS": words,
            "COMP_CWORD": str(len(words.split(" ")) - 1),
        },
        capture_output=True,
        text=True,
    )
    return set(done.stdout.split()), done.stderr.strip()


def test_a_shell_completes_recipes_runs_and_commands_without_heavy_imports(here: Path):
    found, complaints = proposed("denserl train-rm --recipe sandbox", here)
    assert found >= {"sandbox-segment", "sandbox-token", "sandbox-bandit"} and not complaints
    assert all(name.startswith("sandbox-") for name in found)
    assert proposed("denserl report runs/", here) == ({"runs/first", "runs/second"}, "")
    assert proposed("denserl train", here) == ({"train-rm", "train-ppo"}, "")


def test_recipes_are_shipped_names_and_files():
    found = complete_recipe("")
    assert "qwen3-segment" in found and "mine.yaml" in found and "old/" in found
    assert "notes.txt" not in found


def test_runs_are_found_in_their_folder_and_by_path():
    assert complete_run("")[:2] == ["runs/first", "runs/second"]
    assert "old/" in complete_run("o")
    assert "old/third" in complete_run("old/")
