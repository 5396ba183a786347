"""A hostfile and DeepSpeed's launcher."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from denserl_cli.app import app
from denserl_cli.core.errors import DenserlError
from denserl_cli.launch import torchrun as processes
from denserl_cli.launch.hostfile import read_hosts
from denserl_cli.launch.launcher import launch
from denserl_cli.launch.processes import Processes, read_processes
from tests import ROOT, tiny


def write(folder: Path, text: str) -> Path:
    file = folder / "my hosts"
    file.write_text(text)
    return file


def test_machines_and_their_processes(tmp_path: Path):
    file = write(tmp_path, "# ours\n\na.example slots=4\n  b   slots=8  # the new one\n")
    assert read_hosts(file) == {"a.example": 4, "b": 8}
    assert read_processes(None, 1, None, None, file) == Processes(count=12, hostfile=file)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a slots=2\nb slots\n", "my hosts:2: 'b slots'"),
        ("a slots=0\n", "my hosts:1: 'a slots=0'"),
        ("a slots=2\n\na slots=2\n", "my hosts:3: a comes twice"),
        ("# none\n", "my hosts: no machines"),
    ],
)
def test_what_is_no_hostfile_is_refused_with_its_line(text: str, message: str, tmp_path: Path):
    with pytest.raises(DenserlError) as raised:
        read_hosts(write(tmp_path, text))
    assert raised.value.message.endswith(message)


def test_options_that_contradict_it_are_refused(tmp_path: Path):
    with pytest.raises(DenserlError, match="names machines and processes itself"):
        read_processes(2, 1, None, None, write(tmp_path, "a slots=2\n"))
    with pytest.raises(DenserlError, match="No such file"):
        read_processes(None, 1, None, None, tmp_path / "gone")


@pytest.mark.parametrize(
    ("text", "message"),
    [("a slots=1\nb slots=1\n", "pdsh"), ("localhost slots=1\nb slots=1\n", "localhost among 2")],
)
def test_what_could_not_start_is_refused(text: str, message: str, tmp_path: Path, monkeypatch):
    pytest.importorskip("deepspeed")
    monkeypatch.setattr(shutil, "which", lambda _: None if message == "pdsh" else "/bin/pdsh")
    with pytest.raises(DenserlError, match=message):
        start(write(tmp_path, text), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def start(file: Path, folder: Path) -> None:
    recipe = tiny.recipe("reward_model.micro_batch_size=4")
    on = read_processes(None, 1, None, None, file)
    launch("train-rm", recipe, out=folder, mode="start", dry_run=False, processes=on)


def test_a_dry_run_prints_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "a slots=2\nb slots=2\n")
    words = ["train-rm", "--recipe", "sandbox-segment", "--hostfile", "my hosts", "--dry-run"]
    result = CliRunner().invoke(app, [*words, "--set", "reward_model.micro_batch_size=4"])
    (line,) = (line for line in result.output.splitlines() if "which starts" in line)
    assert f"--hostfile '{tmp_path}/my hosts' --master_addr a " in line
    assert "--module denserl_cli.launch.worker train-rm --recipe" in line
    assert [file.name for file in tmp_path.iterdir()] == ["my hosts"]


def test_deepspeeds_launcher_runs_the_processes_of_this_machine(tmp_path: Path, monkeypatch):
    """Both meet, one fails, and its error is shown once."""
    pytest.importorskip("deepspeed")
    started: list[list[str]] = []
    monkeypatch.setattr(processes, "WORKER", "tests.failing_worker")
    monkeypatch.setattr(os, "execv", lambda _, words: started.append(words))
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    start(write(tmp_path, "localhost slots=2\n"), tmp_path / "a run")
    ((program, *words),) = started
    assert program == sys.executable
    environment = {**os.environ, "FAILS": "user", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(ROOT)
    job = subprocess.run(
        [program, *words], env=environment, capture_output=True, text=True, timeout=120
    )
    assert job.returncode in (1, 2)  # that of the process that the launcher sees end first
    assert job.stderr.count("error: no such file: x") == 1
    assert "Traceback" not in job.stderr
