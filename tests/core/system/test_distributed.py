from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from denserl_cli.core.system import distributed
from denserl_cli.core.system.distributed import from_local_main_process
from tests import ROOT


def test_one_process_asks_itself() -> None:
    assert from_local_main_process(lambda: "so") == "so"


WORKER = "tests.core.system.patient_worker"


def start(places: list[tuple[str, int]], folder: Path, *words: str, world: int = 0) -> list:
    """Processes of `patient_worker`, by rank. places: machine and local rank of each."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    common["WORLD_SIZE"] = str(world or len(places))
    return [
        subprocess.Popen(
            [sys.executable, "-m", WORKER, str(folder), *words, str(port)],
            cwd=ROOT,
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(local),
                 "MACHINE": machine},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, (machine, local) in enumerate(places)
    ]  # fmt: skip


@pytest.mark.parametrize(
    "places",
    [
        [("a", 0), ("a", 1), ("b", 0)],
        # DeepSpeed's launcher, for slots=1 and slots=2: local rank = rank % slots
        [("a", 0), ("b", 1 % 2), ("b", 2 % 2)],
    ],
    ids=["torchrun", "DeepSpeed"],
)
def test_the_first_of_each_machine_speaks_however_long_it_takes(
    places: list[tuple[str, int]], tmp_path: Path
) -> None:
    for process in start(places, tmp_path):
        assert process.wait(timeout=300) == 0, process.stderr.read()
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(3)]
    first = {machine: f"rank {rank}" for rank, (machine, local) in enumerate(places) if not local}
    # the second machine's takes its time, and the first waits for it
    assert found == [[first[machine], True] for machine, _ in places]


@pytest.mark.parametrize("slots", [(3, 2), (2, 3), (1, 4), (4, 1), (2, 2)])
def test_ranks_are_grouped_by_machine_however_the_launcher_counts(slots: tuple[int, int]) -> None:
    machines = [name for name, count in zip("ab", slots, strict=True) for _ in range(count)]
    counts = dict(zip("ab", slots, strict=True))
    by_deepspeed = [(name, rank % counts[name]) for rank, name in enumerate(machines)]
    by_torchrun = [(name, rank - machines.index(name)) for rank, name in enumerate(machines)]
    for places in (by_deepspeed, by_torchrun):
        for rank, name in enumerate(machines):
            assert places[distributed._local_main_rank(rank, places)] == (name, 0)


def test_a_machine_whose_first_process_fails_is_not_waited_for(tmp_path: Path) -> None:
    both = start([("a", 0), ("b", 0)], tmp_path, "fail")
    codes = [process.wait(timeout=300) for process in both]
    assert codes[1] == 1
    assert (tmp_path / "lost.txt").read_text()


@pytest.mark.parametrize("how", ["fails", "is killed"])
def test_processes_that_meet_do_not_wait_for_one_that_has_gone(how: str, tmp_path: Path) -> None:
    """Two of three have come when one says that it fails, or the store's own process is killed."""
    first, second = both = start([("a", 0), ("b", 0)], tmp_path, world=3)
    port = int(first.args[-1])
    store = TCPStore("127.0.0.1", port, timeout=timedelta(minutes=2))
    while store.add("denserl/here/0", 0) < 2:
        time.sleep(0.1)
    assert first.poll() is None and second.poll() is None
    if how == "fails":
        store.add("denserl/failed/0", 1)
    else:
        first.kill()
    for process in both if how == "fails" else [second]:
        _, errors = process.communicate(timeout=20)
        assert process.returncode == 1
        assert "the connection to another process of the job is lost" in errors
    first.communicate()


def test_processes_that_do_not_come_are_named(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("MEETING", "3")
    (first,) = start([("a", 0)], tmp_path, world=3)
    _, errors = first.communicate(timeout=120)
    assert first.returncode == 1 and "of 3 processes, 1, 2 did not come within 3 seconds" in errors
