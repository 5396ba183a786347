import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from denserl_cli import __version__, app
from denserl_cli.core.errors import DenserlError, Interrupted
from denserl_cli.core.system.verbosity import VARIABLE, verbosity
from tests import ROOT, tiny


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
    result = CliRunner(env={"COLUMNS": "80"}).invoke(app.app, [*words, "--help"])
    assert result.exit_code == 0
    *_, example, more = result.output.strip().splitlines()
    assert f"Example: denserl {' '.join(words)}" in example, "an example of one line"
    pages = more.strip().removeprefix("More: ").split(", ")
    assert pages and all((ROOT / page).is_file() for page in pages)
    assert max(map(len, result.output.splitlines())) <= 80


@pytest.mark.parametrize("words", [(), *commands(app.app)], ids=" ".join)
def test_help_speaks_of_no_python_type(words: tuple[str, ...]):
    result = CliRunner().invoke(app.app, [*words, "-h"])
    assert result.exit_code == 0
    assert not re.search(r"<(int|float|str|bool|path|list)|range>", result.output)


def test_commands_and_options_stand_in_groups():
    lines = CliRunner().invoke(app.app, ["--help"]).output.splitlines()
    groups = [line for line in lines if line.endswith(":") and not line.startswith(" ")]
    assert groups == ["Start:", "Train:", "Look:", "Measure and use:", "Machines:", "Options:"]
    train = lines[lines.index("Train:") + 1 : lines.index("Look:")]
    assert [line.split()[0] for line in train if line[2:3].strip()] == [
        *("train-rm", "fit-function", "import-normalizer", "train-ppo")
    ]
    lines = CliRunner().invoke(app.app, ["train-ppo", "--help"]).output.splitlines()
    groups = [line for line in lines if line.endswith(":") and not line.startswith(" ")]
    assert groups == ["Recipe:", "Run:", "Several processes:", "Options:"]


def test_summaries_are_whole_at_80_columns():
    words = " ".join(CliRunner().invoke(app.app, ["--help"]).output.split())
    for command in app.app.registered_commands:
        summary = " ".join(command.callback.__doc__.split("\n\n")[0].split()).rstrip(".")
        assert summary in words


def test_without_arguments_the_help_is_shown():
    result = CliRunner().invoke(app.app, [])
    assert "train-rm" in result.output and "Usage:" in result.output


def test_version():
    for option in ("--version", "-V"):
        assert CliRunner().invoke(app.app, [option]).output == f"denserl {__version__}\n"


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
    ("words", "advice"),
    [
        (["train-rm", "sandbox-segment"], "denserl train-rm --recipe sandbox-segment"),
        (["evaluate", "rm", "x.yaml", "--json"], "denserl evaluate rm --recipe x.yaml"),
        (["validate", "--recipe", "x.yaml"], "denserl validate x.yaml"),
        (["recipes", "show", "-r", "x.yaml"], "denserl recipes show x.yaml"),
    ],
)
def test_a_recipe_in_the_wrong_place_is_told_the_right_one(words: list[str], advice: str):
    result = CliRunner().invoke(app.app, words, prog_name="denserl")
    assert result.exit_code == 2
    assert result.stderr.strip().endswith(f"say: {advice}")


def test_quiet_and_verbose_may_stand_before_or_behind_the_command(monkeypatch):
    seen = []
    monkeypatch.setattr(
        "denserl_cli.core.recipe.load_recipe", lambda *_: seen.append(verbosity()) or tiny.recipe()
    )
    for words in (["-q", "validate", "x"], ["validate", "x", "--quiet"], ["validate", "-v", "x"]):
        monkeypatch.setenv(VARIABLE, "normal")
        assert CliRunner().invoke(app.app, words).exit_code == 0
    assert seen == ["quiet", "quiet", "verbose"]


def test_verbose_shows_where_an_error_comes_from(tmp_path: Path):
    done = denserl("validate", "nowhere.yaml", "-v", cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" in done.stderr and "error: no recipe 'nowhere.yaml'" in done.stderr


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
