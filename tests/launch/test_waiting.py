"""A launcher that waits for the other machines answers signals at once and leaves nothing."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from tests import ROOT, tiny

CASES = {
    "ctrl-c, first": (("--node-rank", "0"), signal.SIGINT, 130),
    "scheduler, first": (("--node-rank", "0"), signal.SIGUSR1, 75),
    "ctrl-c, second": (("--node-rank", "1"), signal.SIGINT, 130),
    "scheduler, second": (("--node-rank", "1"), signal.SIGTERM, 75),
    "not numbered": ((), signal.SIGTERM, 75),
    "second of a Slurm job": (("--node-rank", "1"), signal.SIGUSR1, 75),
}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def start(folder: Path, *words: str) -> subprocess.Popen[str]:
    """One machine of two. folder: for its temporary files and its run."""
    folder.mkdir()
    line = [sys.executable, "-m", "denserl_cli.app", "train-rm", *tiny.words(), *words]
    line += ["-r", "sandbox-segment", "--out", str(folder / "run"), "--set"]
    line += ["reward_model.micro_batch_size=4", "--nodes", "2", "--processes", "1"]
    line += ["--rendezvous", f"127.0.0.1:{free_port()}"]
    environment = {**os.environ, "TMPDIR": str(folder), "PYTHONPATH": str(ROOT)}
    if "Slurm" in folder.name:
        environment["SLURM_STEP_ID"] = "0"
    return subprocess.Popen(line, env=environment, stderr=subprocess.PIPE, text=True)


def test_signals_are_answered_while_the_others_are_awaited(tmp_path: Path):
    jobs = {
        name: (start(tmp_path / name.replace(",", ""), *words), number, code)
        for name, (words, number, code) in CASES.items()
    }
    until = time.monotonic() + 120
    while len(list(tmp_path.glob("*/denserl-*"))) < len(jobs) and time.monotonic() < until:
        time.sleep(0.1)
    time.sleep(15)  # torch is imported, and all of them wait in its sockets
    found = {}
    for name, (process, number, code) in jobs.items():
        assert process.poll() is None, name
        process.send_signal(number)
        found[name] = (process, code, time.monotonic())
    for name, (process, code, began) in found.items():
        _, errors = process.communicate(timeout=60)
        assert time.monotonic() - began < 30, name
        assert process.returncode == code, (name, errors)
        shown = 0 if "Slurm" in name else 1  # the first node of the job tells it in the same log
        assert errors.count("interrupted:") == shown and "Traceback" not in errors, (name, errors)
    assert not list(tmp_path.glob("*/denserl-*")) and not list(tmp_path.glob("*/run"))
