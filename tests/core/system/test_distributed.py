from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

from denserl_cli.core.system.distributed import said_by_first_of_machine
from tests import ROOT


def test_one_process_asks_itself() -> None:
    assert said_by_first_of_machine(lambda: "so") == "so"


def test_the_first_of_each_machine_speaks_however_long_it_takes(tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run(
        [*launch, "-m", "tests.core.system.patient_worker", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=300,
    )
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    # the second machine's takes its time, and the first waits for it
    assert first == ["rank 0", "rank 0", True]
    assert second == ["rank 0", "rank 1"]


def test_a_machine_whose_first_process_fails_is_not_waited_for(tmp_path: Path) -> None:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    both = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.core.system.patient_worker", str(tmp_path), "fail"],
            cwd=ROOT,
            env={
                **os.environ,
                **{"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"},
                **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
            },
            stderr=subprocess.DEVNULL,
        )
        for rank in range(2)
    ]
    codes = [process.wait(timeout=300) for process in both]
    assert codes[1] == 1
    assert (tmp_path / "lost.txt").read_text()
