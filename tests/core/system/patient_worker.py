"""A process of `test_distributed.py`: asks the first of its machine, which takes its time."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from denserl_cli.core.system import distributed


def main() -> None:
    distributed.join()
    if sys.argv[2:] == ["fail"]:
        fail(Path(sys.argv[1]))
        return
    name = f"rank {distributed.rank()}"

    def slowly() -> str:
        time.sleep(1)
        return name

    found = [distributed.said_by_first_of_machine(slowly)]
    os.environ["LOCAL_RANK"] = "0"  # now each is on a machine of its own
    if distributed.is_main_process():
        began = time.monotonic()
        found.append(distributed.said_by_first_of_machine(lambda: name))
        found.append(time.monotonic() - began > 0.5)
    else:
        found.append(distributed.said_by_first_of_machine(slowly))
    Path(sys.argv[1], f"{distributed.rank()}.json").write_text(json.dumps(found))
    distributed.leave()


def fail(place: Path) -> None:
    """The second machine's first process ends with an error; the first one's must not wait on."""

    def work() -> str:
        if distributed.is_main_process():
            return "done"
        raise OSError("no space left")

    try:
        distributed.said_by_first_of_machine(work)
    except RuntimeError as error:
        (place / "lost.txt").write_text(str(error))


if __name__ == "__main__":
    main()
