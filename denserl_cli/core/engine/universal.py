"""Checkpoints of DeepSpeed in the form that any number of processes can read."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from denserl_cli.core.errors import DenserlError
from denserl_cli.core.system.distributed import barrier, broadcast_object, is_main_process


@contextmanager
def universal(folder: Path, tag: str) -> Iterator[Path]:
    """Yield a folder with DeepSpeed's universal form of a checkpoint, which is dropped afterwards.

    The first process makes it, in the room of a checkpoint beside the others.

    Args:
        folder: What `save_checkpoint` wrote to.
        tag: Under which it was written.

    Raises:
        DenserlError: DeepSpeed cannot convert it.
    """
    aside = folder.parent.parent / f"universal-{folder.name}"
    failure = _convert(folder / tag, aside / tag) if is_main_process() else None
    failure = broadcast_object(failure)
    try:
        if failure is not None:
            raise DenserlError(
                f"{folder} cannot be read by another number of processes: {failure}",
                hint="go on with as many processes as before",
            )
        yield aside
        barrier()
    finally:
        if is_main_process():
            shutil.rmtree(aside, ignore_errors=True)


def _convert(source: Path, target: Path) -> str | None:
    """Run DeepSpeed's converter; what it says where it fails."""
    shutil.rmtree(target.parent, ignore_errors=True)
    program = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
    folders = ["--input_folder", str(source), "--output_folder", str(target)]
    workers = ["--num_extract_workers", "1", "--num_merge_workers", "1"]
    done = subprocess.run(
        [*program, *folders, *workers, "--inject_missing_state"], capture_output=True, text=True
    )
    if done.returncode == 0:
        return None
    return (done.stderr.strip() or done.stdout.strip() or "no reason").splitlines()[-1]
