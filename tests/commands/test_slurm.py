"""The batch script: its words, and what it does with a stand-in for Slurm."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from denserl_cli.app import app
from denserl_cli.commands.slurm import _seconds
from denserl_cli.core.errors import DenserlError
from denserl_cli.core.system.signals import REQUEUE
from tests import ROOT, tiny

ASK = ("slurm", "--recipe", "sandbox-segment", "--stage", "train-rm", "--gpus-per-node", "1")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "a b"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def denserl(*words: str):
    return CliRunner().invoke(app, words)


def stand_in(place: Path, srun: str) -> dict[str, str]:
    """The environment of a job of one node, with commands that do what Slurm's do there."""
    place.mkdir()
    scripts = {
        "srun": f'[ "$1" = --cpu-bind=none ] && shift\n{srun}\n',
        "scontrol": f'echo "$@" >> {shlex.quote(str(place / "asked"))}\necho localhost\n',
    }
    for name, text in scripts.items():
        (place / name).write_text(f"#!/bin/bash\n{text}")
        (place / name).chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{place}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_NNODES": "1",
        "SLURM_NODEID": "0",
    }


def test_the_script_asks_for_what_was_asked():
    words = ("--nodes", "2", "--gpus-per-node", "4", "--time", "1-02:00:00", "--partition", "a100")
    words += ("--set", "reward_model.micro_batch_size=2", "--to", "-", "--notice", "600")
    text = denserl(*ASK, *words).output
    lines = [line for line in text.splitlines() if line.startswith("#SBATCH")]
    for wanted in ("nodes=2", "ntasks-per-node=1", "gpus-per-node=4", "time=1-02:00:00",
                   "partition=a100", "signal=USR1@600", "requeue"):  # fmt: skip
        assert f"#SBATCH --{wanted}" in lines
    assert list(Path().iterdir()) == []


def test_a_script_is_not_overwritten_unless_that_is_wanted(here: Path):
    result = denserl(*ASK, "--to", "job")
    assert result.output == "wrote job; submit it with: sbatch job\n"
    (here / "job").write_text("mine")
    result = denserl(*ASK, "--to", "job")
    assert isinstance(result.exception, DenserlError) and "job exists" in result.exception.message
    assert (here / "job").read_text() == "mine"
    assert denserl(*ASK, "--to", "job", "--fresh").exit_code == 0
    assert (here / "job").read_text().startswith("#!/bin/bash\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--time", "soon"), "--time soon"),
        (("--time", "00:01:00", "--notice", "3600"), "--time 00:01:00 leaves nothing"),
        (("--time", "2", "--notice", "120"), "--time 2 leaves nothing"),
        (("--time", "0:00:00"), "--time 0:00:00 leaves nothing"),
        (("--partition", "a\n#SBATCH --x"), "--partition a"),
        (("--gpus-per-node", "3"), "not a multiple"),
        (("--set", "reward_model.batch=1"), "unknown key"),
    ],
)
def test_what_could_not_run_is_refused(words: tuple[str, ...], message: str):
    result = denserl(*ASK, *words)
    assert isinstance(result.exception, DenserlError) and message in str(result.exception)
    assert list(Path().iterdir()) == []


def test_values_reach_the_command_as_they_are(here: Path, tmp_path: Path):
    recipe = here / "it's a $HOME recipe.yaml"
    recipe.write_text("extends: sandbox-segment\nname: odd\n")
    words = ("--recipe", recipe.name, "--out", "x y/run", "--set", "run.name=a  b")
    denserl(*ASK[:1], *ASK[3:], *words[:4], "--to", "job")
    subprocess.run(["bash", "-n", "job"], check=True)
    environment = stand_in(tmp_path / "bin", f"printf '%s\\0' \"${{@:5}}\" > {tmp_path / 'words'}")
    subprocess.run(["bash", here / "job"], check=True, env=environment, cwd="/")
    given = (tmp_path / "words").read_text().split("\0")[:-1]
    assert given[1:] == [
        *("-m", "denserl_cli.app", "train-rm", "--recipe", recipe.name),
        *("--out", str(here / "x y" / "run"), "--resume", "--processes", "1"),
        *("--nodes", "1", "--rendezvous", "localhost:20007"),
    ]


@pytest.mark.parametrize("code", [0, 1, REQUEUE])
def test_an_interrupted_job_goes_back_into_the_queue_and_no_other(code: int, tmp_path: Path):
    denserl(*ASK, "--to", "job")
    environment = stand_in(tmp_path / "bin", f"exit {code}")
    assert subprocess.run(["bash", "job"], env=environment, check=False).returncode == code
    asked = (tmp_path / "bin" / "asked").read_text().splitlines()
    assert ("requeue 7" in asked) is (code == REQUEUE)


def test_the_script_runs_a_stage_that_has_not_begun(here: Path, tmp_path: Path):
    denserl(*ASK, *tiny.words("reward_model.epochs=0.2"), "--to", "job", "--out", "my run")
    environment = stand_in(tmp_path / "bin", 'exec "$@"')
    job = subprocess.run(["bash", "job"], env=environment, capture_output=True, text=True)
    assert job.returncode == 0, job.stderr
    book = json.loads((here / "my run" / "run.json").read_text())
    assert book["stages"]["train-rm"]["status"] == "finished"


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        *(("90", 5400), ("1:30", 90), ("01:02:03", 3723)),
        *(("2-03", 183_600), ("2-03:04", 183_840), ("2-03:04:05", 183_845)),
    ],
)
def test_a_time_limit_is_read_as_slurm_reads_it(time: str, seconds: int):
    assert _seconds(time) == seconds
