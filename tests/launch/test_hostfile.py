"""A hostfile and DeepSpeed's launcher."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from typer.testing import CliRunner

from denserl_cli.app import app
from denserl_cli.core.errors import DenserlError
from denserl_cli.launch import ssh
from denserl_cli.launch.hostfile import read_hosts
from denserl_cli.launch.processes import Processes, read_processes
from denserl_cli.launch.ssh import run_hosts
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


def test_localhost_among_others_is_refused(tmp_path: Path):
    with pytest.raises(DenserlError, match="localhost among 2"):
        read_hosts(write(tmp_path, "localhost slots=1\nb slots=1\n"))


def test_without_ssh_nothing_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    file = write(tmp_path, "a slots=1\nb slots=1\n")
    with pytest.raises(DenserlError, match="ssh, which is not installed"):
        run_hosts(file, "train-rm", tiny.recipe(), tmp_path / "run", "start")
    assert [one.name for one in tmp_path.iterdir()] == ["my hosts"]


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1", "127.0.0.7"])
def test_one_machine_that_is_this_one_needs_no_ssh(name: str, tmp_path: Path):
    file = write(tmp_path, f"{name} slots=3\n")
    assert read_processes(None, 1, None, None, file) == Processes(count=3)


def test_one_other_machine_is_not_replaced_by_this_one(tmp_path: Path):
    file = write(tmp_path, "192.0.2.7 slots=3\n")  # an address of no machine
    assert read_processes(None, 1, None, None, file) == Processes(count=3, hostfile=file)


def test_a_dry_run_prints_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "a slots=2\nb slots=2\n")
    words = ["train-rm", "--recipe", "sandbox-segment", "--hostfile", "my hosts", "--dry-run"]
    result = CliRunner().invoke(app, [*words, "--set", "reward_model.micro_batch_size=4"])
    lines = [line for line in result.output.splitlines() if "which starts" in line]
    assert [shlex.split(line)[-2] for line in lines] == ["a", "b"]
    assert all("-m denserl_cli.launch.ssh run" in line for line in lines)
    assert [file.name for file in tmp_path.iterdir()] == ["my hosts"]


def test_deepspeeds_file_of_variables_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("NCCL_IB_HCA", "GLOO_SOCKET_IFNAME", "OMP_NUM_THREADS", "HF_HOME"):
        monkeypatch.setenv(name, f"my {name}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    monkeypatch.setenv("SECRET", "x")
    (tmp_path / ".deepspeed_env").write_text("# ours\n\nNCCL_DEBUG=INFO\nMINE = a=b c\n")
    found = ssh._environment()
    assert (found["NCCL_DEBUG"], found["MINE"], found["HF_HOME"]) == ("INFO", "a=b c", "my HF_HOME")
    assert {"NCCL_IB_HCA", "GLOO_SOCKET_IFNAME", "OMP_NUM_THREADS"} <= set(found)
    assert not {"CUDA_VISIBLE_DEVICES", "SECRET"} & set(found)
    (tmp_path / ".deepspeed_env").write_text("NCCL_DEBUG\n")
    with pytest.raises(DenserlError, match=r"\.deepspeed_env:1: 'NCCL_DEBUG'"):
        ssh._environment()


class Machines:
    """Two machines that are this one, behind a stand-in for ssh, and a job on them."""

    def __init__(self, place: Path, *settings: str) -> None:
        self.place = place
        bin_folder = place.parent / "bin"
        bin_folder.mkdir()
        place.mkdir()
        (bin_folder / "ssh").write_text(
            "#!/bin/bash\n"
            'while [ "$1" = -o ]; do shift 2; done\n'
            'if [ "$1" = 127.0.0.9 ]; then\n'
            '    echo "ssh: connect to host $1 port 22: No route to host" >&2; exit 255\nfi\n'
            'cd / && exec bash -c "$2"\n'  # as sshd does it, through the user's shell
        )
        (bin_folder / "ssh").chmod(0o755)
        self.words = [sys.executable, "-m", "denserl_cli.app", "train-rm", "--hostfile", "hosts"]
        self.words += ["-r", "sandbox-segment", *tiny.words(*settings), "--out", "my run"]
        path = f"{bin_folder}:{os.environ['PATH']}"
        self.environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
        self.environment |= {"OMP_NUM_THREADS": "1", "DENSERL_CACHE": str(place / "cache")}

    def start(self, hosts: str, *words: str) -> subprocess.Popen[str]:
        (self.place / "hosts").write_text(hosts)
        return subprocess.Popen(
            [*self.words, *words],
            cwd=self.place,
            env=self.environment,
            stderr=subprocess.PIPE,
            text=True,
        )

    def processes(self) -> list[str]:
        """The command lines of the job's processes."""
        found = []
        for one in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if os.fsencode(self.place) in (one / "environ").read_bytes():
                    found.append((one / "cmdline").read_text().replace("\0", " "))
        return found

    def wait_for_steps(self, job: subprocess.Popen[str], count: int) -> None:
        log = self.place / "my run" / "metrics.jsonl"
        while not (log.exists() and log.read_text().count("\n") >= count):
            assert job.poll() is None, job.communicate()
            time.sleep(0.05)


UNEQUAL = ("reward_model.batch_size=6", "reward_model.micro_batch_size=2")
BOTH = "127.0.0.1 slots=2\n127.0.0.2 slots=1\n"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_machines_with_unequal_slots_in_a_folder_that_a_shell_would_read(tmp_path: Path):
    """The whole job, stopped by a scheduler, resumed and killed: nothing is left of it."""
    pytest.importorskip("deepspeed")
    place = tmp_path / "R&D $(touch oops) 'a b' %n; touch oops"
    machines = Machines(place, *UNEQUAL, "reward_model.epochs=20")
    job = machines.start(BOTH)
    machines.wait_for_steps(job, 2)
    job.send_signal(signal.SIGTERM)
    _, errors = job.communicate(timeout=60)
    assert job.returncode == 75 and errors.count("interrupted: stopped after step") == 1, errors
    assert "Traceback" not in errors and machines.processes() == []
    job = machines.start(BOTH, "--resume")
    steps = (place / "my run" / "metrics.jsonl").read_text().count("\n")
    machines.wait_for_steps(job, steps + 2)
    job.kill()
    job.communicate(timeout=60)
    until = time.monotonic() + 10
    while left := machines.processes():
        assert time.monotonic() < until, left
        time.sleep(0.2)
    assert not list(tmp_path.rglob("oops")) and not Path("/oops").exists()


def test_a_machine_that_cannot_be_reached_is_told_before_anything_starts(tmp_path: Path):
    machines = Machines(tmp_path / "place", *UNEQUAL)
    job = machines.start("127.0.0.1 slots=2\n127.0.0.9 slots=1\n")
    _, errors = job.communicate(timeout=60)
    assert job.returncode == 2
    assert "127.0.0.9: ssh: connect to host 127.0.0.9 port 22: No route to host" in errors
    assert not (tmp_path / "place" / "my run").exists()
    assert not list((tmp_path / "place").glob(".my run*"))


def test_an_error_on_one_machine_ends_all_and_is_shown_once(tmp_path: Path):
    pytest.importorskip("deepspeed")
    machines = Machines(tmp_path / "place", *UNEQUAL, "reward_model.batch_size=6000")
    job = machines.start(BOTH)
    _, errors = job.communicate(timeout=120)
    assert job.returncode == 2 and errors.count("error:") == 1, errors
    assert "Traceback" not in errors and machines.processes() == []
