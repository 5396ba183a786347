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
        "srun": f'while [[ "$1" == --* ]]; do shift; done\n{srun}\n',
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
        (("--account", "a b"), "--account a b"),
        (("--sbatch", "a\nb"), "--sbatch 'a"),
        (("--gres", "gpu:3"), "--gres gpu:3 and --gpus-per-node 1"),
        (("--array", "2,2"), "--array 2,2: no list of seeds"),
        (("--array", "sandbox-token"), "--array names recipes, and so does --recipe"),
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


@pytest.mark.parametrize(
    ("restarts", "checkpoint", "requeued"),
    [(0, "old", True), (1, "old", False), (1, "new", True), (7, "old", False), (7, "new", True)],
)
def test_a_job_that_writes_no_checkpoint_is_not_requeued_for_ever(
    restarts: int, checkpoint: str, requeued: bool, here: Path, tmp_path: Path
):
    denserl(*ASK, "--to", "job", "--out", "my run")
    old, new = (here / "my run" / "checkpoints" / "train-rm" / f"step-{n:08d}" for n in (9, 10))
    old.mkdir(parents=True)
    write = f"mkdir -p {shlex.quote(str(old if checkpoint == 'old' else new))}"
    environment = stand_in(tmp_path / "bin", f"{write}; exit {REQUEUE}")
    environment |= {"SLURM_RESTART_COUNT": str(restarts)}
    job = subprocess.run(["bash", "job"], env=environment, stderr=subprocess.PIPE, text=True)
    asked = (tmp_path / "bin" / "asked").read_text().splitlines()
    assert job.returncode == REQUEUE and ("requeue 7" in asked) is requeued
    assert ("wrote no checkpoint" in job.stderr) is not requeued


@pytest.mark.parametrize(("restarts", "requeued"), [(2, True), (3, False)])
def test_a_job_is_requeued_as_often_as_the_user_wants(
    restarts: int, requeued: bool, here: Path, tmp_path: Path
):
    denserl(*ASK, "--to", "job", "--out", "run", "--requeue-limit", "3")
    environment = stand_in(
        tmp_path / "bin", f"mkdir -p run/checkpoints/train-rm/step-1; exit {REQUEUE}"
    )
    environment |= {"SLURM_RESTART_COUNT": str(restarts)}
    subprocess.run(["bash", "job"], env=environment, stderr=subprocess.DEVNULL)
    asked = (tmp_path / "bin" / "asked").read_text().splitlines()
    assert ("requeue 7" in asked) is requeued


def test_the_cluster_gets_what_it_asks_for():
    words = (
        "--account",
        "me",
        "--qos",
        "long",
        "--dependency",
        "afterok:12",
        "--gres",
        "gpu:a100:4",
    )
    text = denserl(
        *ASK[:5],
        *words,
        "--set",
        "reward_model.micro_batch_size=2",
        "--sbatch=--mem=0",
        "--sbatch=-C a100|h100",
        "--to",
        "-",
    ).output
    lines = [line for line in text.splitlines() if line.startswith("#SBATCH")]
    for wanted in ("--account=me", "--qos=long", "--dependency=afterok:12", "--gres=gpu:a100:4",
                   "--mem=0", "-C a100|h100"):  # fmt: skip
        assert f"#SBATCH {wanted}" in lines
    assert "gpus-per-node" not in text and "--processes 4 " in text
    assert "srun --cpu-bind=none --wait=300 " in text  # a node that cannot start holds nobody


@pytest.mark.parametrize(
    ("array", "folders"),
    [("3,5-6", ["sandbox-segment/seed-3", "sandbox-segment/seed-5", "sandbox-segment/seed-6"]),
     ("sandbox-token,sandbox-bandit", ["sandbox-token", "sandbox-bandit"])],
)  # fmt: skip
def test_an_array_has_a_folder_for_each_run(
    array: str, folders: list[str], here: Path, tmp_path: Path
):
    recipe = ASK[1:3] if array[0] == "3" else ()
    denserl("slurm", *recipe, *ASK[3:], "--array", array, "--to", "job")
    assert f"#SBATCH --array=0-{len(folders) - 1}\n" in (here / "job").read_text()
    found = tmp_path / "words"
    environment = stand_in(tmp_path / "bin", f"printf '%s\\0' \"${{@:5}}\" > {found}")
    for number, folder in enumerate(folders):
        environment["SLURM_ARRAY_TASK_ID"] = str(number)
        subprocess.run(["bash", "job"], check=True, env=environment)
        given = found.read_text().split("\0")[4:-1]
        name, _, seed = folder.partition("/seed-")
        own = ["--recipe", name, *(["--set", f"seed={seed}"] if seed else [])]
        assert given[: len(own) + 2] == [*own, "--out", str(here / "runs" / folder)]


@pytest.mark.parametrize(("array", "kind"), [((), "afterok"), (("--array", "1,2"), "aftercorr")])
def test_all_stages_are_submitted_one_after_the_other(
    array: tuple[str, ...], kind: str, here: Path, tmp_path: Path
):
    result = denserl(*ASK[:3], "--stage", "all", *ASK[5:], *array)
    assert "submit it with: bash sandbox-segment-all.sh" in result.output
    environment = stand_in(tmp_path / "bin", "exit 1")
    sbatch = tmp_path / "bin" / "sbatch"
    log = tmp_path / "submitted"
    sbatch.write_text(f'#!/bin/bash\necho "$@" >> {log}\nwc -l < {log}\n')
    sbatch.chmod(0o755)
    subprocess.run(["bash", "sandbox-segment-all.sh"], check=True, env=environment)
    first, second, third = log.read_text().splitlines()
    place = f"{here}/sandbox-segment-"
    assert first == f"--parsable {place}train-rm.sbatch"
    after = f"--parsable --dependency={kind}:%d --kill-on-invalid-dep=yes {place}%s.sbatch"
    assert [second, third] == [after % (1, "fit-function"), after % (2, "train-ppo")]


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
