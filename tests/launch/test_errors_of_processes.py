"""One of several processes fails: the job ends within seconds, the first error is shown, once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from denserl_cli.core.errors import DenserlError, Interrupted
from denserl_cli.launch import torchrun as processes
from denserl_cli.launch.job_folder import VARIABLE, JobFolder, Report
from denserl_cli.launch.processes import Processes, read_processes
from denserl_cli.launch.torchrun import run_processes
from tests import ROOT, tiny

SECONDS = 30


def fails(how: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> DenserlError:
    """The error of a job of two of which the second one fails."""
    monkeypatch.setattr(processes, "WORKER", "tests.failing_worker")
    monkeypatch.setenv("FAILS", how)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv(VARIABLE, "")  # restored afterwards
    began = time.monotonic()
    with pytest.raises(DenserlError) as raised:
        run_processes(Processes(count=2), "train-rm", tiny.recipe(), folder, "start")
    assert time.monotonic() - began < SECONDS
    return raised.value


@pytest.mark.parametrize(
    ("how", "message", "code"),
    [
        ("everywhere", "/full/x: No space left on device", 2),
        ("user", "no such file: x", 2),
        ("killed", "process 1 was killed by SIGKILL", 1),
        ("exit", "process 1 ended with code 3\nlast words", 1),
    ],
)
def test_the_first_error_is_shown_alone(
    how: str, message: str, code: int, tmp_path: Path, monkeypatch, capfd
):
    error = fails(how, tmp_path / "run", monkeypatch)
    assert (error.message, error.exit_code) == (message, code)
    assert capfd.readouterr() == ("", "")


def test_a_bug_shows_its_traceback_once(tmp_path: Path, monkeypatch, capfd):
    error = fails("bug", tmp_path / "run", monkeypatch)
    assert error.exit_code == 1
    assert error.message.startswith("Traceback") and error.message.endswith("ValueError: a bug")
    assert error.message.count("Traceback") == 1
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("how", "shown"), [("user", "no such file: x"), ("bug", "ValueError: a bug")]
)
def test_started_by_torchrun_the_first_error_is_shown_once(how: str, shown: str, tmp_path: Path):
    words = ["--standalone", "--nproc-per-node=2", "-m", "tests.failing_worker", "--app"]
    words += ["train-rm", "--recipe", "sandbox-segment", "--out", str(tmp_path / "run")]
    words += ["--set", "reward_model.micro_batch_size=8"]
    environment = {**os.environ, "FAILS": how, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(ROOT)
    job = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *words],
        env=environment,
        capture_output=True,
        text=True,
        timeout=2 * SECONDS,
    )
    assert job.returncode == 1  # torchrun's own code
    assert job.stderr.count(shown) == 1
    assert "Connection closed" not in job.stderr


def test_what_another_launcher_has_started_counts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert read_processes(None, 1, None, None) == Processes(count=8, started=True)


def test_a_batch_must_divide_among_the_processes_of_another_launcher(tmp_path, monkeypatch):
    from denserl_cli.launch.launcher import launch

    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(DenserlError, match=r"8 is not a multiple of .* 8 × 3 processes") as raised:
        launch(
            "train-rm",
            tiny.recipe(),
            out=tmp_path / "run",
            mode="start",
            dry_run=False,
            processes=read_processes(None, 1, None, None),
        )
    assert raised.value.hint and "must be a multiple of 3" in raised.value.hint
    assert "6" in raised.value.hint and "9" in raised.value.hint


def failure(code: int) -> SimpleNamespace:
    return SimpleNamespace(exitcode=code, local_rank=0, signal_name=lambda: "SIGKILL")


def report(place: Path, rank: int, kind: str, when: float, code: int = 1) -> None:
    JobFolder(place).write_report(rank, Report(kind, when, f"{kind} of {rank}", None, code))


def test_the_earliest_error_wins_over_those_that_follow_from_it(tmp_path: Path):
    report(tmp_path, 0, "lost", 1.0)
    report(tmp_path, 1, "interrupted", 2.0, 75)
    report(tmp_path, 2, "error", 4.0, 2)
    report(tmp_path, 3, "error", 3.0, 2)
    failures = {0: failure(1), 1: failure(75), 2: failure(2), 3: failure(-9)}
    error = JobFolder(tmp_path).first_error(failures)
    assert (error.message, error.exit_code) == ("error of 3", 2)


def test_a_job_that_was_stopped_elsewhere_says_so(tmp_path: Path):
    report(tmp_path, 0, "interrupted", 1.0, 75)
    report(tmp_path, 1, "lost", 2.0)
    failures = {0: failure(75), 1: failure(1)}
    for asked in (None, signal.SIGTERM):
        error = JobFolder(tmp_path).first_error(failures, asked)
        assert isinstance(error, Interrupted)  # "interrupted:", as one process says it
        assert (error.message, error.exit_code) == ("interrupted of 0", 75)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_before_the_work_is_an_interruption(number: int, code: int, tmp_path: Path):
    error = JobFolder(tmp_path).first_error({0: failure(-number), 1: failure(-9)}, number)
    assert error.exit_code == code and "stopped at once" in error.message


def test_a_killed_process_is_the_reason_why_others_were_stopped(tmp_path: Path):
    report(tmp_path, 0, "interrupted", 1.0, 75)
    error = JobFolder(tmp_path).first_error({0: failure(75), 1: failure(-9)})
    assert error.message == "process 1 was killed by SIGKILL"


@pytest.mark.parametrize("later", [False, True])
def test_a_signal_that_comes_again_later_kills_what_does_not_answer(
    later: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    if later:
        monkeypatch.setattr(processes, "_TWICE", -1)
    with subprocess.Popen(["sleep", "60"]) as worker:
        worker.send_signal(signal.SIGSTOP)  # a stopped process hears nothing but SIGKILL
        (tmp_path / "worker-1.pid").write_text(str(worker.pid))
        with processes._signals_handed_on(JobFolder(tmp_path)) as asked:
            for _ in range(2):
                signal.raise_signal(signal.SIGTERM)
        assert asked() == signal.SIGTERM
        worker.send_signal(signal.SIGCONT)
        assert worker.wait(10) == -(signal.SIGKILL if later else signal.SIGTERM)
