"""Checkpoints: whole or absent, of these settings or refused, as many as fit."""

import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from denserl_cli.core.errors import DenserlError
from denserl_cli.core.observer import Observer
from denserl_cli.core.runs import checkpoints
from denserl_cli.core.runs.checkpoints import Checkpoint, Checkpoints, fingerprint
from tests.fakes import RecordingObserver

SETTINGS = {"seed": 1, "optimizer.betas": [0.9, 0.99], "lora": None}


def kept_in(
    folder: Path, settings: dict[str, Any] = SETTINGS, keep: int = 9, gigabytes: float | None = None
) -> Checkpoints:
    return Checkpoints(folder, settings, keep=keep, gigabytes=gigabytes)


def state(step: int, size: int = 50) -> dict[str, Any]:
    return {"weights": torch.full((size,), float(step)), "kl": 0.5, "best": None}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def kept(tmp_path: Path) -> Checkpoints:
    """Three checkpoints."""
    made = kept_in(tmp_path / "stage")
    for step in (1, 2, 3):
        made.save(step, state(step))
    return made


def newest(kept: Checkpoints) -> Path:
    return kept.folder / "step-00000003" / "state.pt"


def found(kept: Checkpoints, observer: Observer | None = None) -> Checkpoint:
    checkpoint = kept.latest(observer or Observer())
    assert checkpoint is not None
    return checkpoint


def test_what_is_saved_is_what_is_found(kept: Checkpoints):
    recorder = RecordingObserver()
    checkpoint = found(kept, recorder)
    assert checkpoint.step == 3 and recorder.notices == []
    assert torch.equal(checkpoint.state["weights"], torch.full((50,), 3.0))
    assert (checkpoint.state["kl"], checkpoint.state["best"]) == (0.5, None)
    assert names(kept.folder) == ["step-00000001", "step-00000002", "step-00000003"]


def test_without_checkpoints_there_is_none(tmp_path: Path):
    assert kept_in(tmp_path / "nowhere").latest(Observer()) is None


# damage


def test_a_checkpoint_cut_anywhere_is_passed_over(kept: Checkpoints):
    whole = newest(kept).read_bytes()
    rng = np.random.default_rng(0)
    cuts = {0, 1, 3, 4, 30, 64, *rng.integers(len(whole), size=40), *range(len(whole))[-30:]}
    for cut in sorted(int(cut) for cut in cuts):
        newest(kept).write_bytes(whole[:cut])
        recorder = RecordingObserver()
        assert found(kept, recorder).step == 2, cut
        assert len(recorder.notices) == 1 and "step-00000003 is damaged" in recorder.notices[0]


def test_no_flipped_byte_changes_a_number_unseen(kept: Checkpoints):
    """A byte that no checksum covers, such as padding, may flip; then nothing that counts does."""
    whole, good = newest(kept).read_bytes(), found(kept).state
    rng = np.random.default_rng(0)
    passed = 0
    for place in rng.permutation(len(whole))[:400].tolist():
        spoilt = bytearray(whole)
        spoilt[place] ^= 1 << int(rng.integers(8))
        newest(kept).write_bytes(spoilt)
        checkpoint = found(kept)
        if checkpoint.step == 3:
            assert torch.equal(checkpoint.state.pop("weights"), good["weights"]), place
            assert checkpoint.state == {"kl": 0.5, "best": None}, place
        else:
            passed += 1
    assert passed > 50


def test_zeros_where_data_should_be_are_seen(kept: Checkpoints):
    whole = bytearray(newest(kept).read_bytes())
    place = whole.index(torch.full((50,), 3.0).numpy().tobytes())
    whole[place : place + 16] = bytes(16)
    newest(kept).write_bytes(whole)
    recorder = RecordingObserver()
    assert found(kept, recorder).step == 2
    assert "is not what was written" in recorder.notices[0]


def a_plain_state(file: Path) -> None:
    torch.save(state(3), file)


def another_schema(file: Path) -> None:
    torch.save({"schema": 99, "state": {}}, file)


def no_mapping(file: Path) -> None:
    torch.save([1, 2], file)


def code(file: Path) -> None:
    torch.save({"schema": 1, "state": Path("x")}, file)


def a_missing_file(file: Path) -> None:
    file.unlink()


@pytest.mark.parametrize("spoil", [a_plain_state, another_schema, no_mapping, code, a_missing_file])
def test_what_is_no_checkpoint_of_this_version_is_passed_over(kept: Checkpoints, spoil: Any):
    spoil(newest(kept))
    recorder = RecordingObserver()
    assert found(kept, recorder).step == 2
    assert len(recorder.notices) == 1 and "is damaged" in recorder.notices[0]


def test_a_disk_that_cannot_be_read_is_no_damage(kept: Checkpoints, monkeypatch):
    """Older work must not replace newer work because a server was away for a moment."""

    def away(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(torch, "load", away)
    with pytest.raises(OSError, match="Input/output error"):
        kept.latest(Observer())


def test_other_folders_are_no_checkpoints(kept: Checkpoints):
    for name in ("step-", "step-x", "step-00000009.bak", ".step-00000009.tmp", "notes"):
        (kept.folder / name).mkdir()
    assert found(kept).step == 3


# settings and versions


def test_a_checkpoint_of_other_settings_is_refused_by_its_content(kept: Checkpoints):
    other = kept_in(kept.folder, {**SETTINGS, "seed": 2})
    with pytest.raises(DenserlError, match="written under other settings") as caught:
        other.latest(Observer())
    assert caught.value.hint and "--fresh" in caught.value.hint
    assert found(kept).step == 3


def test_the_fingerprint_is_of_the_content():
    assert fingerprint({"a": 1, "b": [0.1, 2]}) == fingerprint({"b": [0.1, 2], "a": 1})
    assert fingerprint({"a": 1, "new": None}) == fingerprint({"a": 1})
    assert len({fingerprint({"a": value}) for value in (1, 2, "1", [1], True, 0.1)}) == 6


def test_other_versions_are_told(kept: Checkpoints, monkeypatch):
    now = checkpoints.numeric_versions()
    assert now["torch"] == str(torch.__version__)
    monkeypatch.setattr(checkpoints, "numeric_versions", lambda: {**now, "torch": "9.9"})
    recorder = RecordingObserver()
    assert found(kept, recorder).step == 3
    (notice,) = recorder.notices
    assert f"written with torch {now['torch']}:" in notice


# how many stay


@pytest.mark.parametrize(
    ("keep", "kilobytes", "expected"),
    [(2, None, [4, 5]), (9, None, [1, 2, 3, 4, 5]), (9, 140, [4, 5]), (1, 1e6, [5]),
     (9, 1, [5]), (2, 230, [4, 5])],
)  # fmt: skip
def test_the_newest_stay_by_number_and_by_size(
    tmp_path: Path, keep: int, kilobytes: float | None, expected: list[int]
):
    """Each takes about 43 kB."""
    gigabytes = None if kilobytes is None else kilobytes / 1e6
    made = kept_in(tmp_path / "stage", keep=keep, gigabytes=gigabytes)
    for step in range(1, 6):
        made.save(step, state(step, size=10_000 if kilobytes != 140 else 16_000))
    assert [int(name[5:]) for name in names(made.folder)] == expected


def test_later_checkpoints_can_be_dropped(kept: Checkpoints):
    kept.drop_after(1)
    assert names(kept.folder) == ["step-00000001"]


# a full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 300 kB, where this process may mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(place)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("cannot mount a tmpfs")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_keeps_the_previous_checkpoint(small_disk: Path):
    made = kept_in(small_disk / "stage")
    made.save(1, state(1))
    for size in (100_000, 10_000_000):
        with pytest.raises(DenserlError, match="the disk is full: the checkpoint after") as caught:
            made.save(2, state(2, size))
        assert caught.value.exit_code == 2
        assert "after step 2 was not written" in caught.value.message
        assert "step-00000001 is intact" in caught.value.message
        assert caught.value.hint and "--resume" in caught.value.hint
        assert names(made.folder) == ["step-00000001"]
    assert found(made).step == 1
    made.save(2, state(2))
    assert found(made).step == 2


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fills_up_while_syncing_is_full(kept: Checkpoints, monkeypatch, number: int):
    def full(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DenserlError, match=r"disk is full.*step-00000003 is intact"):
        kept.save(4, state(4))
    assert names(kept.folder) == ["step-00000001", "step-00000002", "step-00000003"]


def test_other_errors_of_the_disk_are_not_called_full(kept: Checkpoints, monkeypatch):
    def broken(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="Input/output error"):
        kept.save(4, state(4))
    assert found(kept).step == 3
