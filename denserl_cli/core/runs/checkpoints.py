"""Complete states to resume from: one folder a step, whole or absent."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from denserl_cli.core.errors import DenserlError
from denserl_cli.core.system.distributed import barrier, broadcast_object, is_main_process
from denserl_cli.core.system.environment import numeric_versions
from denserl_cli.core.system.files import aside_of, full_disk_named, replaced_folder

if TYPE_CHECKING:
    from denserl_cli.core.engine.base import Engine
    from denserl_cli.core.observer import Observer

SCHEMA = 1


@dataclass(frozen=True)
class Checkpoint:
    """A complete state and the number of steps after which it was taken."""

    step: int
    state: dict[str, Any]
    folder: Path


class DamagedError(Exception):
    """A checkpoint that is not what was once written."""


class Checkpoints:
    """The checkpoints of one stage.

    Args:
        folder: where they are.
        settings: those that decide what the stage computes.
        keep: the number of checkpoints that stay, the newest ones.
        gigabytes: the size that they may have together; the newest stays in any case.
    """

    def __init__(
        self, folder: Path, settings: Mapping[str, Any], *, keep: int, gigabytes: float | None
    ) -> None:
        self.folder = folder
        self.settings = fingerprint(settings)
        self.keep, self.gigabytes = keep, gigabytes

    def save(
        self, step: int, state: Mapping[str, Any], shards: Mapping[str, Engine] | None = None
    ) -> None:
        """Write a complete state aside, rename it into place and drop the oldest ones.

        Args:
            step: the number of steps after which it is taken.
            state: what the main process writes of it.
            shards: engines by name; in each process they write its part into a folder of that name.

        Raises:
            DenserlError: the disk is full; the earlier checkpoints are intact then.
        """
        import torch

        record = {
            "schema": SCHEMA,
            "step": step,
            "settings": self.settings,
            "versions": numeric_versions(),
            "state": dict(state),
        }
        try:
            with _together(self.folder / f"step-{step:08d}") as aside:
                for name, engine in (shards or {}).items():
                    engine.save_shards(aside / name)
                barrier()
                if is_main_process():
                    record["files"] = [str(file.relative_to(aside)) for file in _shards(aside)]
                    # a file of Python's own: torch hides why its own could not be written
                    with (aside / "state.pt").open("wb") as file:
                        torch.save(record, file)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise self._disk_full(step) from error
        if is_main_process():
            self._prune()

    def latest(self, observer: Observer) -> Checkpoint | None:
        """The newest whole checkpoint; damaged ones are passed over with a notice.

        Raises:
            DenserlError: it was written under other settings.
        """
        # one process alone checks, which reads all that was written
        found = self._newest(observer) if is_main_process() else None
        folder = broadcast_object(None if found is None else found.folder)
        if is_main_process() or folder is None:
            return found
        record = _read(folder / "state.pt")
        return Checkpoint(record["step"], record["state"], folder)

    def _newest(self, observer: Observer) -> Checkpoint | None:
        """The newest whole checkpoint, with its files checked."""
        for folder in self._folders():
            try:
                for shard in _shards(folder):
                    _check(shard)
                record = _read(folder / "state.pt")
                for name in record.get("files", []):
                    if not (folder / name).exists():
                        raise DamagedError(f"{name} is missing")
            except DamagedError as error:
                observer.notice(f"checkpoint {folder} is damaged ({error}); trying an older one")
                continue
            if record["settings"] != self.settings:
                raise DenserlError(
                    f"checkpoint {folder} was written under other settings than this recipe's",
                    hint="start the stage again with --fresh, or name another folder with --out",
                )
            then, now = record["versions"], numeric_versions()
            changed = [f"{name} {then.get(name)}" for name in now if then.get(name) != now[name]]
            if changed:
                observer.notice(
                    f"checkpoint {folder} was written with {', '.join(changed)}: rounding may "
                    "differ from here on"
                )
            return Checkpoint(record["step"], record["state"], folder)
        return None

    def drop_after(self, step: int) -> None:
        """Remove the checkpoints of later steps, which are about to be done again."""
        for folder in self._folders():
            if _step(folder) > step:
                shutil.rmtree(folder, ignore_errors=True)

    def clear(self) -> None:
        """Remove all checkpoints."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _folders(self) -> list[Path]:
        """The folders of checkpoints, newest first."""
        found = [f for f in self.folder.glob("step-*") if f.name[len("step-") :].isdecimal()]
        return sorted(found, key=_step, reverse=True)

    def _prune(self) -> None:
        size = 0
        for newer, folder in enumerate(self._folders()):
            size += sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
            large = self.gigabytes is not None and size > self.gigabytes * 1e9
            if newer and (newer >= self.keep or large):
                shutil.rmtree(folder, ignore_errors=True)

    def _disk_full(self, step: int) -> DenserlError:
        folders = self._folders()
        intact = f"{folders[0]} is intact" if folders else "there is no earlier one"
        return DenserlError(
            f"the disk is full: the checkpoint after step {step} was not written; {intact}",
            hint="make room (run.keep_checkpoints and run.keep_gigabytes need less), then go on "
            "with --resume",
        )


def newest_step(run: Path, stage: str) -> int | None:
    """The step of a stage's newest checkpoint in a run folder; it is not read."""
    names = [folder.name for folder in (run / "checkpoints" / stage).glob("step-*")]
    steps = [name.removeprefix("step-") for name in names]
    return max((int(step) for step in steps if step.isdecimal()), default=None)


def fingerprint(settings: Mapping[str, Any]) -> str:
    """A hash of settings. Those that are null do not count: a later version may add fields."""
    given = {key: value for key, value in settings.items() if value is not None}
    return hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()


@contextmanager
def _together(folder: Path) -> Iterator[Path]:
    """Yield, to all processes, a folder aside that becomes `folder` when all are done with it."""
    with replaced_folder(folder) if is_main_process() else full_disk_named(folder):
        barrier()
        yield aside_of(folder)
        barrier()
    barrier()


def _shards(folder: Path) -> list[Path]:
    """The files of a checkpoint's folder."""
    return sorted(folder.rglob("*.pt"))


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _check(file: Path) -> None:
    """Compare a file's contents with its own checksums, which torch.load does not."""
    import zipfile

    with _damage(), zipfile.ZipFile(file) as archive:
        if (broken := archive.testzip()) is not None:
            raise DamagedError(f"{broken} is not what was written")


def _read(file: Path) -> dict[str, Any]:
    """Read a checkpoint's own file. Raises DamagedError when it is torn or of another schema."""
    import torch

    with _damage():
        record = torch.load(file, map_location="cpu", weights_only=True)
        if record["schema"] != SCHEMA:
            raise DamagedError(f"schema {record['schema']}, expected {SCHEMA}")
    return record


@contextmanager
def _damage() -> Iterator[None]:
    """Turn what readers raise for torn files into DamagedError."""
    import pickle
    import zipfile
    import zlib

    try:
        yield
    except OSError as error:  # EINVAL: a torn file leads to an impossible position
        if error.errno not in (errno.ENOENT, errno.EINVAL):
            raise
        raise DamagedError(error.strerror) from error
    except (
        *(RuntimeError, EOFError, ValueError, LookupError, TypeError),
        *(zipfile.BadZipFile, zlib.error, pickle.UnpicklingError),
    ) as error:
        raise DamagedError(str(error) or repr(error)) from error
