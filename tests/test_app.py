import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from denserl_cli import __version__, app
from denserl_cli.core.errors import DenserlError, Interrupted
from tests import ROOT


def denserl(*words: str, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "denserl_cli.app", *words],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )


def commands(typer_app, *prefix: str):
    for command in typer_app.registered_commands:
        yield (*prefix, command.name)
    for group in typer_app.registered_groups:
        yield from commands(group.typer_instance, *prefix, group.name)


@pytest.mark.parametrize("words", list(commands(app.app)), ids=" ".join)
def test_every_help_ends_with_an_example(words: tuple[str, ...]):
    result = CliRunner().invoke(app.app, [*words, "--help"])
    assert result.exit_code == 0
    assert f"Example: denserl {' '.join(words)}" in result.output.strip().splitlines()[-1]


def test_without_arguments_the_help_is_shown():
    result = CliRunner().invoke(app.app, [])
    assert "train-rm" in result.output and "Usage:" in result.output


def test_version():
    assert CliRunner().invoke(app.app, ["--version"]).output == f"denserl {__version__}\n"


def test_an_error_is_one_message_and_exit_code_2(tmp_path: Path):
    done = denserl("validate", "nowhere.yaml", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: no recipe 'nowhere.yaml'")
    assert "Traceback" not in done.stderr


def test_a_wrong_option_is_exit_code_2(tmp_path: Path):
    done = denserl("train-rm", cwd=tmp_path)
    assert done.returncode == 2
    assert "Missing option '--recipe'" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "code"),
    [(DenserlError("x"), 2), (Interrupted("saved"), 130), (KeyboardInterrupt(), 130)],
)
def test_exit_codes(error: BaseException, code: int, monkeypatch, capsys):
    def stop(*_: object) -> None:
        raise error

    monkeypatch.setattr("denserl_cli.core.recipe.load_recipe", stop)
    monkeypatch.setattr(sys, "argv", ["denserl", "validate", "x"])
    with pytest.raises(SystemExit) as caught:
        app.main()
    assert caught.value.code == code


def test_a_bug_keeps_its_traceback(monkeypatch):
    def stop(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("denserl_cli.core.recipe.load_recipe", stop)
    monkeypatch.setattr(sys, "argv", ["denserl", "validate", "x"])
    with pytest.raises(ZeroDivisionError):
        app.main()


def test_a_closed_pipe_is_quiet(tmp_path: Path):
    (tmp_path / "r.yaml").write_text("model: {path: a/b}\nsegmentation: {cutoff: 1.0}\n")
    shell = f"{sys.executable} -m denserl_cli.app recipes show r.yaml | true"
    done = subprocess.run(
        shell,
        shell=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
