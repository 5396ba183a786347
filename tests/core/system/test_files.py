import errno
import os
from pathlib import Path

import pytest

from denserl_cli.core.system import files
from denserl_cli.core.system.files import clear_leftovers, replaced_folder, write_text


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_text_is_replaced_in_one_piece(tmp_path: Path):
    file = tmp_path / "new" / "file.txt"
    for text in ("first", "zweites – ü\n"):
        write_text(file, text)
        assert file.read_text(encoding="utf-8") == text
    assert names(file.parent) == ["file.txt"]


def test_a_device_and_a_pipe_stay_what_they_are(tmp_path: Path):
    pipe, link = tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_text(pipe, "text")
    assert os.read(reader, 9) == b"text" and pipe.is_fifo()
    os.close(reader)
    link.symlink_to(os.devnull)
    write_text(link, "text")
    assert link.is_symlink() and names(tmp_path) == ["link", "pipe"]
    with (tmp_path / "opened").open("wb") as file:
        opened = Path(f"/proc/self/fd/{file.fileno()}")
        write_text(opened, "text")
    assert (tmp_path / "opened").read_text() == "text"
    with pytest.raises(IsADirectoryError):
        write_text(tmp_path, "text")


def test_a_text_that_cannot_be_written_leaves_the_old_one(tmp_path: Path):
    file = tmp_path / "file.txt"
    write_text(file, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(file, "new \ud800")
    assert file.read_text() == "old"


def test_a_folder_takes_its_place_when_it_is_filled(tmp_path: Path):
    folder = tmp_path / "a" / "folder"
    for name in ("first", "second"):
        with replaced_folder(folder) as aside:
            assert names(aside) == []
            (aside / name).write_text(name)
            assert name == "first" or names(folder) == ["first"]
        assert names(folder) == [name]
    assert names(folder.parent) == ["folder"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_old_folder_stays_when_filling_fails(tmp_path: Path, error: type[BaseException]):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "old").write_text("old")
    with pytest.raises(error), replaced_folder(folder) as aside:
        (aside / "new").write_text("half")
        raise error
    assert names(tmp_path) == ["folder"] and names(folder) == ["old"]


def test_what_a_killed_process_left_aside_is_cleared(tmp_path: Path):
    for name in (".folder.tmp", ".folder.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rest").write_text("rest")
    with replaced_folder(tmp_path / "folder") as aside:
        (aside / "new").write_text("new")
    with replaced_folder(tmp_path / "folder") as aside:
        (aside / "newer").write_text("newer")
    assert names(tmp_path) == ["folder"] and names(tmp_path / "folder") == ["newer"]


def test_files_are_on_the_disk_before_they_are_renamed(tmp_path: Path, monkeypatch):
    synced: list[str] = []
    monkeypatch.setattr(
        files.os, "fsync", lambda handle: synced.append(os.readlink(f"/proc/self/fd/{handle}"))
    )
    write_text(tmp_path / "file", "x")
    assert [Path(name).parent for name in synced] == [tmp_path, tmp_path.parent]
    assert Path(synced[0]).name.endswith(".tmp") and Path(synced[1]) == tmp_path
    synced.clear()
    with replaced_folder(tmp_path / "folder") as aside:
        (aside / "inner").mkdir()
        for name in ("a", "inner/b"):
            (aside / name).write_text(name)
    inside = {str(aside / name) for name in ("", "a", "inner", "inner/b")}
    assert set(synced[:4]) == inside and synced[4:] == [str(tmp_path)]


def test_leftovers_of_killed_writes_go_and_what_they_had_moved_away_comes_back(tmp_path: Path):
    for name in (".half.tmp", ".both.old", "both", ".moved.old", ".moved.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rest").write_text(name)
    (tmp_path / ".run.json.77.tmp").write_text("{")
    (tmp_path / ".profile").write_text("not ours")
    clear_leftovers(tmp_path)
    assert names(tmp_path) == [".profile", "both", "moved"]
    assert (tmp_path / "moved" / "rest").read_text() == ".moved.old"
    assert (tmp_path / "both" / "rest").read_text() == "both"
    clear_leftovers(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_has_one_name_and_leaves_nothing_aside(error: Exception, tmp_path: Path):
    folder = tmp_path / "folder"
    with pytest.raises(OSError) as caught, replaced_folder(folder) as aside:
        (aside / "half").write_text("half")
        raise error
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(folder)
    assert names(tmp_path) == []


def test_other_errors_keep_their_kind(tmp_path: Path):
    with pytest.raises(PermissionError), replaced_folder(tmp_path / "folder"):
        raise PermissionError(errno.EACCES, "no")


def test_a_file_that_cannot_be_written_goes_by_its_own_name(tmp_path: Path, monkeypatch):
    (tmp_path / "file.txt").mkdir()
    with pytest.raises(OSError) as caught:
        write_text(tmp_path / "file.txt" / ("x" * 250), "text")  # its aside's name is too long
    assert caught.value.filename == str(tmp_path / "file.txt" / ("x" * 250))
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(full))
    with pytest.raises(OSError) as caught:
        write_text(tmp_path / "new.txt", "text")
    assert caught.value.filename == str(tmp_path / "new.txt")
    assert names(tmp_path) == ["file.txt"]
