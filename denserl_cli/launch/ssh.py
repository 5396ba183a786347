"""A job on the machines of a hostfile: one ssh a machine starts our own launcher there.

The launcher here stays the parent. What a machine is to do, and later each signal, goes through the
standard input of its ssh; its end tells the machine that this launcher has gone. Nothing but two
paths reaches the remote shell, and these are quoted.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from denserl_cli.core.errors import DenserlError
from denserl_cli.core.recipe import Recipe, load_recipe
from denserl_cli.core.system.signals import STOP_SIGNALS, ignore_signals, stopped_before_work
from denserl_cli.launch.hostfile import read_hosts
from denserl_cli.launch.job_folder import JobFolder, Report
from denserl_cli.launch.processes import Processes

TRAVELS = (
    *("CUDA_DEVICE_ORDER", "CUDA_HOME", "DENSERL_", "DS_", "GLOO_", "HF_", "LD_LIBRARY_PATH"),
    *("MLFLOW_", "NCCL_", "OMP_", "PATH", "PYTHON", "TOKENIZERS_", "TORCH_", "TRANSFORMERS_"),
    *("UCX_", "WANDB_", "http_proxy", "https_proxy", "no_proxy"),
)
"""Beginnings of the environment variables that the other machines get from here."""
_OPTIONS = ("BatchMode=yes", "ConnectTimeout=10", "ServerAliveInterval=10", "ServerAliveCountMax=3")
_GRACE = 30.0
"""Seconds that the other machines have to end by themselves when one has failed."""


def run_hosts(file: Path, stage: str, recipe: Recipe, folder: Path, mode: str) -> None:
    """Run a stage on the machines of a hostfile; returns when all have finished.

    Raises:
        DenserlError: a machine cannot be reached or does not see the run folder, or the first error
            of any process, after all of them have ended.
        Interrupted: a signal has ended the job.
    """
    hosts = read_hosts(file)
    if shutil.which("ssh") is None:
        raise DenserlError(
            f"--hostfile {file}: its machines are started through ssh, which is not installed",
            hint="install ssh, or start denserl on each machine with --nodes, --node-rank and "
            "--rendezvous",
        )
    place = job_path(stage, folder)
    shutil.rmtree(place, ignore_errors=True)
    try:
        job = JobFolder.make(place, recipe)
        with _asked() as asked:
            port = _reach_all(file, list(hosts), place, asked)
            first = next(iter(hosts)).rpartition("@")[2]
            common = {
                "job": str(place),
                "stage": stage,
                "folder": str(folder.absolute()),
                "mode": mode,
                "environment": _environment(),
                "nodes": len(hosts),
                "rendezvous": f"{first}:{port}",
            }
            parts = [
                {**common, "node_rank": number, "count": count}
                for number, count in enumerate(hosts.values())
            ]
            _run_all(dict(zip(hosts, parts, strict=True)), job, asked)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def job_path(stage: str, folder: Path) -> Path:
    """The job's folder beside the run folder, on the file system that all machines share."""
    return folder.absolute().with_name(f".{folder.name}.{stage}.job")


def host_command(host: str, *words: str) -> list[str]:
    """The ssh command that runs a part of this module on a machine, in the folder of this one."""
    here, path = shlex.quote(str(Path.cwd())), os.environ.get("PYTHONPATH", "")
    prefix = ["env", f"PYTHONPATH={path}"] if path else []
    line = shlex.join([*prefix, sys.executable, "-m", "denserl_cli.launch.ssh", *words])
    options = [word for option in _OPTIONS for word in ("-o", option)]
    # what users of pdsh, which DeepSpeed's launcher uses, may have set
    options += shlex.split(os.environ.get("PDSH_SSH_ARGS_APPEND", ""))
    return ["ssh", *options, host, f"cd {here} && exec {line}"]


@contextmanager
def _asked() -> Iterator[list[int]]:
    """Collect the signals that ask to stop."""
    asked: list[int] = []
    before = {
        number: signal.signal(number, lambda number, _: asked.append(number))
        for number in STOP_SIGNALS
    }
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _reach_all(file: Path, hosts: list[str], job: Path, asked: list[int]) -> int:
    """Try every machine; returns a free port of the first one.

    Raises DenserlError with all that cannot take part.
    """
    tried = {
        host: subprocess.Popen(
            host_command(host, "check", str(job)),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for host in hosts
    }
    while any(process.poll() is None for process in tried.values()):
        if asked:
            for process in tried.values():
                process.kill()
            raise stopped_before_work(asked[0])
        time.sleep(0.05)
    said = {host: process.communicate() for host, process in tried.items()}
    problems = [
        f"{host}: {(errors.strip().splitlines() or [f'ended with code {process.returncode}'])[-1]}"
        for (host, process), (_, errors) in zip(tried.items(), said.values(), strict=True)
        if process.returncode
    ]
    if problems:
        raise DenserlError(
            "\n".join([f"--hostfile {file}: not every machine can take part", *problems]),
            hint="each needs ssh without a password, the same paths, and this Python with denserl",
        )
    return int(said[hosts[0]][0].split()[-1])


def _run_all(parts: Mapping[str, Mapping[str, Any]], job: JobFolder, asked: list[int]) -> None:
    """Run every machine's part and hand signals on; the first error ends them all."""
    running = {}
    for host, part in parts.items():
        process = subprocess.Popen(host_command(host, "run"), stdin=subprocess.PIPE, text=True)
        running[host] = process
        _write(process, json.dumps(part))
    told, failed_at = 0, None
    while any(process.poll() is None for process in running.values()):
        for number in asked[told:]:
            for process in running.values():
                _write(process, str(number))
        told = len(asked)
        if failed_at is None and any(process.returncode for process in running.values()):
            failed_at = time.monotonic()
        if failed_at is not None and time.monotonic() - failed_at > _GRACE:
            _end(running)
        time.sleep(0.05)
    ended = {host: process.returncode for host, process in running.items() if process.returncode}
    if ended:
        raise _first_error(job, ended, asked)


def _write(process: subprocess.Popen[str], line: str) -> None:
    """Send a line to a machine that may have ended."""
    assert process.stdin is not None
    with suppress(OSError, ValueError):
        process.stdin.write(line + "\n")
        process.stdin.flush()


def _end(running: Mapping[str, subprocess.Popen[str]]) -> None:
    """End the machines that are left: first by the end of their input, then by ending ssh."""
    for process in running.values():
        assert process.stdin is not None
        with suppress(OSError):
            process.stdin.close()
    for process in running.values():
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()


def _first_error(job: JobFolder, ended: Mapping[str, int], asked: list[int]) -> DenserlError:
    """The first error that a machine has reported, or how the first one has ended."""
    if job.reports():
        return job.first_error({}, asked[0] if asked else None)
    host, code = next(iter(ended.items()))
    lost = f"the connection to {host} is lost, or its launcher was killed"
    error = DenserlError(
        lost if code == 255 else f"{host} ended with code {code}",
        hint="--resume goes on from the last checkpoint",
    )
    error.exit_code = 1
    return error


def _environment() -> dict[str, str]:
    """The variables that travel, and those of DeepSpeed's own file, `.deepspeed_env`."""
    found = {name: value for name, value in os.environ.items() if name.startswith(TRAVELS)}
    name = os.environ.get("DS_ENV_FILE", ".deepspeed_env")
    for file in (Path("~", name).expanduser(), Path(name)):
        lines = file.read_text("utf-8").splitlines() if file.is_file() else []
        for number, line in enumerate(map(str.strip, lines), 1):
            if not line or line.startswith("#"):
                continue
            key, equals, value = line.partition("=")
            if not equals:
                raise DenserlError(f"{file}:{number}: {line!r}", hint="write NAME=VALUE")
            found[key.strip()] = value.strip()
    return found


def main() -> None:
    """Take part in a job that a launcher on another machine has started through ssh."""
    if sys.argv[1] == "check":
        _check(Path(sys.argv[2]))
        return
    lines = _lines()
    part = json.loads(next(lines))
    os.environ.update(part["environment"])
    threading.Thread(target=_obey, args=(lines,), daemon=True).start()
    job = JobFolder(Path(part["job"]))
    try:
        _take_part(part, job)
    except BaseException as error:
        report = Report.of(error)
        job.write_report(part["node_rank"], report)
        os._exit(report.exit_code)
    ignore_signals()


def _check(job: Path) -> None:
    """Print a free port, or end with what is missing here."""
    import socket

    if not JobFolder(job).recipe.exists():
        sys.exit(f"{job.parent} is not the same folder here: it must be shared by all machines")
    with socket.socket() as found:
        found.bind(("", 0))
        print(found.getsockname()[1])


def _lines() -> Iterator[bytes]:
    """The lines of standard input as they come; Python's own reader would hold some back."""
    rest = b""
    while data := os.read(0, 4096):
        *lines, rest = (rest + data).split(b"\n")
        yield from lines


def _obey(lines: Iterator[bytes]) -> None:
    """Hand on what comes from the launcher that started this: signals, and its end."""
    for line in lines:
        os.kill(os.getpid(), int(line))
    for _ in range(2):  # the second one kills what does not answer
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.5)
    time.sleep(8)
    os._exit(1)


def _take_part(part: Mapping[str, Any], job: JobFolder) -> None:
    from denserl_cli.launch.torchrun import run_processes
    from denserl_cli.launch.worker import work

    recipe, folder = load_recipe(str(job.recipe)), Path(part["folder"])
    if part["nodes"] == part["count"] == 1:
        work(part["stage"], recipe, folder, part["mode"])
        return
    several = part["nodes"] > 1
    processes = Processes(
        part["count"],
        part["nodes"],
        part["node_rank"] if several else None,
        part["rendezvous"] if several else None,
    )
    run_processes(processes, part["stage"], recipe, folder, part["mode"])


if __name__ == "__main__":
    main()
