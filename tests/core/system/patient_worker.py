"""A process of `test_distributed.py`: asks the first of its machine, which takes its time."""

from __future__ import annotations

import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

from denserl_cli.core.system import distributed


def main() -> None:
    """Join as one of several; MACHINE is the name of the machine that this process plays."""
    if "MACHINE" in os.environ:
        distributed._machine = lambda: os.environ["MACHINE"]
    if "MEETING" in os.environ:
        distributed._MEETING = timedelta(seconds=int(os.environ["MEETING"]))
    distributed.join()
    if "fail" in sys.argv:
        fail(Path(sys.argv[1]))
        return
    name = f"rank {distributed.rank()}"

    def slowly() -> str:
        if distributed.rank():
            time.sleep(1)
        return name

    began = time.monotonic()
    found = [distributed.from_local_main_process(slowly), time.monotonic() - began > 0.5]
    Path(sys.argv[1], f"{distributed.rank()}.json").write_text(json.dumps(found))
    distributed.leave()


def fail(place: Path) -> None:
    """The second machine's first process ends with an error; the first one's must not wait on."""

    def work() -> str:
        if distributed.is_main_process():
            return "done"
        raise OSError("no space left")

    try:
        distributed.from_local_main_process(work)
    except RuntimeError as error:
        (place / "lost.txt").write_text(str(error))


if __name__ == "__main__":
    main()
