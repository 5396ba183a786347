"""denserl report, on a run of the tiny sandbox and on what is none."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from denserl_cli.app import app
from denserl_cli.core.errors import DenserlError
from tests.core.reporting.conftest import write_run


def report(*words: object) -> Result:
    return CliRunner().invoke(app, ["report", *map(str, words)])


def test_a_run_with_a_reward_model_alone(scored: Path):
    result = report(scored)
    assert result.exit_code == 0, result.exception
    page = (scored / "report.html").read_text(encoding="utf-8")
    for words in ("Reward model", "Normaliser", "accuracy by length difference", "sandbox-segment",
                  "transformers"):  # fmt: skip
        assert words in page
    assert "not run" in page and "train-ppo did not" not in page
    assert f"written to {scored / 'report.html'}" in result.stdout
    assert not (scored / "report.md").exists()


def test_markdown_lies_beside_the_page_with_its_plots(tmp_path: Path):
    folder = write_run(tmp_path / "run")
    result = report(folder, "--html", tmp_path / "out" / "a page.html", "--markdown")
    assert result.exit_code == 0, result.exception
    text = (tmp_path / "out" / "a page.md").read_text(encoding="utf-8")
    images = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)
    assert len(images) > 10
    for image in images:
        assert (tmp_path / "out" / image.replace("%20", " ")).is_file()
    assert "| kl" not in text and "KL, nats a response, held out | 0 → 20 |" in text
    assert "  +0.50  <script>alert(1)</script> " in text  # in a block of code
    assert "### say &lt;b>hi&lt;/b>" in text and "### another \\| prompt" in text
    assert "````text" in text  # around text that holds three
    assert "**serious**: " in text


def test_a_comparison_goes_to_the_current_folder(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two"):
        write_run(tmp_path / name, iterations=1)
    result = report("one", "two")
    assert result.exit_code == 0, result.exception
    assert "Where the recipes differ" in Path("comparison.html").read_text(encoding="utf-8")
    assert not list(tmp_path.glob("*/report.html"))


@pytest.mark.parametrize(
    ("words", "message"),
    [(["page.md", "--markdown"], "page.md is where --markdown writes"),
     ([".", "--markdown"], "--html . is a folder"),
     (["taken.html", "--markdown"], "--markdown taken.md is a folder"),
     (["file/page.html"], "--html file/page.html: .*file cannot be written")],
)  # fmt: skip
def test_a_page_that_cannot_be_written_is_told_before_the_report_is_made(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("denserl_cli.core.reporting.report.make_report", None)
    write_run(Path("run"), iterations=1)
    Path("taken.md").mkdir()
    Path("file").touch()
    result = report("run", "--html", *words)
    assert isinstance(result.exception, DenserlError) and result.exception.exit_code == 2
    assert re.search(message, result.exception.message)


def test_what_is_no_run_is_one_message(tmp_path: Path):
    for folder in (tmp_path, tmp_path / "none"):
        result = report(folder)
        assert isinstance(result.exception, DenserlError) and result.exception.exit_code == 2
    assert list(tmp_path.iterdir()) == []
