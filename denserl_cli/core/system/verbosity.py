"""How much a command says; the environment hands it on to the processes that it starts."""

from __future__ import annotations

import os
from typing import Literal, get_args

Verbosity = Literal["quiet", "normal", "verbose"]

VARIABLE = "DENSERL_VERBOSITY"


def set_verbosity(level: Verbosity) -> None:
    """Let this process and those that it starts say as much as `level`."""
    os.environ[VARIABLE] = level


def verbosity() -> Verbosity:
    """How much is said: notes, results and errors alone; progress too; or the libraries as well."""
    level = os.environ.get(VARIABLE, "normal")
    return level if level in get_args(Verbosity) else "normal"  # type: ignore[return-value]
