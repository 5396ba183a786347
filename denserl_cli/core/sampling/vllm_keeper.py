"""Runs a command for as long as somebody holds this process's input open, and ends all of it.

    python -m denserl_cli.core.sampling.vllm_keeper COMMAND...

However the process that started it ends, kill -9 included, nothing of the command is left over.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

GRACE = 10.0
"""Seconds between the request to end and the end."""


def main() -> None:
    """Run the command; end with its code."""
    command = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, start_new_session=True)
    threading.Thread(target=_end_with_input, args=(command,), daemon=True).start()
    for stopping in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stopping, signal.SIG_IGN)  # the owner decides: Ctrl-C reaches it, too
    code = command.wait()
    _kill(command)
    os._exit(code if code >= 0 else 128 - code)


def _end_with_input(command: subprocess.Popen[bytes]) -> None:
    """Wait for the end of the input, then end the command and what it has started."""
    while os.read(sys.stdin.fileno(), 4096):
        pass
    command.terminate()
    until = time.monotonic() + GRACE
    while command.poll() is None and time.monotonic() < until:
        time.sleep(0.1)
    _kill(command)


def _kill(command: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(command.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


if __name__ == "__main__":
    main()
