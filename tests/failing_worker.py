"""A worker whose second process fails in the way that FAILS names, while the first one waits."""

from __future__ import annotations

import os
import signal
import sys

from denserl_cli.core.errors import DenserlError
from denserl_cli.core.system import distributed
from denserl_cli.launch import worker


def fail(*_: object) -> None:
    how = os.environ["FAILS"]
    if how == "everywhere":
        raise OSError(28, "No space left on device", "/full/x")
    if distributed.rank() == 0:
        distributed.barrier()
    print("on stdout")
    print("last words", file=sys.stderr, flush=True)
    if how == "user":
        raise DenserlError("no such file: x", hint="name another")
    if how == "bug":
        raise ValueError("a bug")
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    os._exit(3)


worker.run_stage = fail
if __name__ == "__main__":
    if "--app" in sys.argv:
        from denserl_cli.app import main

        sys.argv.remove("--app")
        main()
    else:
        worker.main()
