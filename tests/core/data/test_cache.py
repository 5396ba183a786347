"""Encoded data from the cache are those that are encoded anew, and a broken cache is no trouble."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from denserl_cli.core.chat.format import ChatFormat
from denserl_cli.core.data import cache
from denserl_cli.core.data.conversations import read_pairs, read_prompts
from denserl_cli.core.data.encoding import (
    PairEncoding,
    PromptEncoding,
    encode_pairs,
    encode_prompts,
)
from denserl_cli.core.data.mixture import Mixture, mixed
from denserl_cli.core.errors import DenserlError
from denserl_cli.core.recipe.schema import Columns, Source
from tests.core.fake_tokenizers import PLAIN, byte_tokenizer
from tests.fakes import RecordingObserver

CHAT = ChatFormat.of(byte_tokenizer(PLAIN.replace("m.content", "m.content|replace('#', '')")))
LIMITS = {"max_length": 40, "max_prompt_length": 20}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own for each test."""
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def row(number: int, **others: Any) -> dict[str, Any]:
    return {"prompt": f"q{number % 7}", "chosen": "a" * (number % 30 + 1), "rejected": "b"} | others


ROWS = [
    *(row(n, margin=n / 3, subset=f"s{n % 2}", tools=[1] if n == 3 else None) for n in range(20)),
    {"prompt": "x", "chosen": "a"},
    row(1, chosen="#"),
    {"chosen": "Say so", "rejected": "Say no"},
    row(2, prompt="long " * 9),
    [1],
]


def write(path: Path, rows: list[Any] = ROWS) -> Source:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Source(str(path))


def take(*sources: Source, seed: int = 1, strict: bool = False, **limits: int) -> Any:
    """The rows of sources, and what was said and shown meanwhile."""
    recorder, encoding = RecordingObserver(), PairEncoding(CHAT, **{**LIMITS, **limits})
    return mixed(encoding, sources, seed=seed, strict=strict, observer=recorder), recorder


def listed(found: Mixture) -> tuple[list[Any], list[Any], int]:
    return [plain(one) for one in found.rows], list(found.skipped), found.truncated


def plain(one: Any) -> dict[str, Any]:
    return {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in vars(one).items()}


def entries(home: Path) -> list[Path]:
    return sorted(home.glob("data/[!.]*"))


# the same rows


@pytest.mark.parametrize("settings", [{}, {"weight": 2.5}, {"max_samples": 12, "weight": 1.5}])
def test_pairs_are_those_that_are_encoded_in_memory(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    first = replace(write(tmp_path / "a.jsonl"), **settings)
    sources = [first, write(tmp_path / "b.jsonl", [row(n) for n in range(5)])]
    said: list[str] = []
    read = read_pairs(sources, seed=3, notice=said.append)
    direct = encode_pairs(CHAT, read.pairs, **LIMITS)
    for _ in range(2):
        found, recorder = take(*sources, seed=3)
        assert [plain(one) for one in found.rows] == [plain(one) for one in direct.rows]
        assert found.skipped == [*read.skipped, *direct.skipped]
        assert found.truncated == direct.truncated
        assert recorder.notices == said != []


def test_prompts_are_those_that_are_encoded_in_memory(tmp_path: Path) -> None:
    source, recorder = write(tmp_path / "a.jsonl"), RecordingObserver()
    read = read_prompts([source], seed=1)
    direct = encode_prompts(CHAT, read.prompts, 12)
    for _ in range(2):
        encoding = PromptEncoding(CHAT, 12)
        found = mixed(encoding, [source], seed=1, strict=False, observer=recorder)
        assert [plain(one) for one in found.rows] == [plain(one) for one in direct.prompts]
        assert found.skipped == [*read.skipped, *direct.skipped]
        assert found.truncated == direct.truncated == 1
    assert recorder.titles == ["tokenise"]


@pytest.mark.parametrize("kind", ["json", "parquet", "saved"])
def test_every_kind_of_source_is_kept(tmp_path: Path, home: Path, kind: str) -> None:
    rows, path = [row(n) for n in range(6)], tmp_path / f"rows.{kind}"
    if kind == "json":
        path.write_text(json.dumps(rows))
    elif kind == "parquet":
        Dataset.from_list(rows).to_parquet(path)
    else:
        Dataset.from_list(rows).save_to_disk(path)
    (first, heard), (second, again) = take(Source(str(path))), take(Source(str(path)))
    assert listed(first) == listed(second) and len(first.rows) == 6
    assert (heard.titles, again.titles) == (["tokenise"], [])
    if kind == "saved":
        Dataset.from_list(rows[:4]).save_to_disk(tmp_path / "other")
        shutil.rmtree(path)
        (tmp_path / "other").rename(path)
        assert len(take(Source(str(path)))[0].rows) == 4


def test_strict_names_all_rows_before_it_tokenises_and_after(tmp_path: Path) -> None:
    sources = [write(tmp_path / "a.jsonl", [row(1), {}]), write(tmp_path / "b.jsonl", [{}, row(2)])]
    message = r"2 rows .*\n2 x no chosen: .*a.jsonl:2, .*b.jsonl:1"
    for lenient in (False, True):
        if lenient:
            take(*sources)
        with pytest.raises(DenserlError, match=message):
            take(*sources, strict=True)


# what makes a new entry


def test_one_entry_serves_other_places_seeds_weights_and_strictness(
    tmp_path: Path, home: Path
) -> None:
    source = write(tmp_path / "a.jsonl", [row(n) for n in range(9)])
    take(source)
    moved = Source(str(shutil.copy(source.path, tmp_path / "moved.jsonl")), weight=0.5)
    found, recorder = take(moved, seed=9, strict=True)
    assert recorder.titles == [] and len(entries(home)) == 1
    assert len(found.rows) == 4 and found.rows[0].origin.startswith(f"{tmp_path}/moved.jsonl:")


def test_other_content_limits_draws_and_formats_are_other_entries(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "a.jsonl", [row(n) for n in range(9)])
    drawn = replace(source, max_samples=5)
    take(source)
    take(source, max_length=39)
    take(drawn)
    take(drawn, seed=2)
    take(write(tmp_path / "a.jsonl", [row(n + 1) for n in range(9)]))
    assert len(entries(home)) == 5
    for tokenizer in (byte_tokenizer(), byte_tokenizer(eos_token="<eos>")):
        encoding = PairEncoding(ChatFormat.of(tokenizer), **LIMITS)
        mixed(encoding, [source], seed=1, strict=False, observer=RecordingObserver())
    added = byte_tokenizer()
    added.add_tokens(["aa"])
    encoding = PairEncoding(ChatFormat.of(added), **LIMITS)
    mixed(encoding, [source], seed=1, strict=False, observer=RecordingObserver())
    assert len(entries(home)) == 8


# trouble


def test_a_damaged_entry_is_made_again(tmp_path: Path, home: Path) -> None:
    source = write(tmp_path / "a.jsonl")
    whole = listed(take(source)[0])
    (entry,) = entries(home)
    whole_record = (entry / cache.RECORD).read_text()

    def flip() -> None:
        content = bytearray((entry / cache.ROWS).read_bytes())
        content[len(content) // 2] ^= 1
        (entry / cache.ROWS).write_bytes(content)

    def cut() -> None:
        os.truncate(entry / cache.ROWS, 100)

    for spoil in (
        flip,
        cut,
        (entry / cache.ROWS).unlink,
        (entry / cache.RECORD).unlink,
        lambda: (entry / cache.RECORD).write_text("[]"),
        lambda: (entry / cache.RECORD).write_text(
            whole_record.replace('"usable": 2', '"usable": 3')
        ),
    ):
        spoil()
        found, recorder = take(source)
        assert listed(found) == whole
        assert (
            recorder.notices[0] == f"the encoded data in {entry} are damaged; they are made again"
        )
        assert take(source)[1].notices == recorder.notices[1:]


def test_a_cache_that_cannot_be_written_is_told_and_done_without(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "a.jsonl")
    whole = listed(take(source)[0])
    (tmp_path / "file").touch()
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "file" / "cache"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    found, recorder = take(source)
    assert listed(found) == whole
    assert f"the cache {tmp_path / 'file' / 'cache'} cannot be written" in recorder.notices[0]
    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_full_disk_leaves_nothing_behind(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    monkeypatch.setattr("denserl_cli.core.data.arrow_rows.PairRows.batch", full)
    with pytest.raises(DenserlError, match=r"no place for encoded data: .*No space left") as caught:
        take(write(tmp_path / "a.jsonl"))
    assert caught.value.hint is not None and cache.VARIABLE in caught.value.hint
    assert entries(home) == [] == list((tmp_path / "tmp").iterdir())
    assert not list(home.glob("data/.*.tmp"))


def test_what_a_killed_job_left_is_cleared(tmp_path: Path, home: Path) -> None:
    source = write(tmp_path / "a.jsonl")
    take(source)
    (entry,) = entries(home)
    shutil.rmtree(entry)
    for name in ("dead", "alive"):
        (home / "data" / f".{entry.name}.{name}.tmp").mkdir()
    days_ago = time.time() - 2 * 86_400
    os.utime(home / "data" / f".{entry.name}.dead.tmp", (days_ago, days_ago))
    take(source)
    left = [path.name for path in entry.parent.iterdir() if path.suffix == ".tmp"]
    assert left == [f".{entry.name}.alive.tmp"]


def test_a_saved_folder_is_known_by_what_lies_in_it(tmp_path: Path, home: Path) -> None:
    folder = tmp_path / "saved"
    made = []
    for answer in ("one", "two"):
        shutil.rmtree(folder, ignore_errors=True)
        rows = Dataset.from_list([row(1, chosen=f"answer {answer}", rejected="no", prompt="why")])
        rows._fingerprint = "the same"
        rows.save_to_disk(str(folder))
        found, _ = take(Source(str(folder)))
        made.append(listed(found)[0][0]["chosen"])
    assert made[0] != made[1]
    assert len(entries(home)) == 2


def test_two_jobs_at_once_make_an_entry_once(tmp_path: Path, home: Path) -> None:
    source = write(tmp_path / "a.jsonl")
    reached, go_on = threading.Event(), threading.Event()
    found: list[Any] = []

    class Slow(RecordingObserver):
        def begin(self, title: str, total: int | None = None, done: int = 0) -> None:
            super().begin(title, total, done)
            reached.set()
            assert go_on.wait(20)

    class Second(RecordingObserver):
        def notice(self, message: str) -> None:
            super().notice(message)
            go_on.set()

    def work(recorder: RecordingObserver) -> None:
        encoding = PairEncoding(CHAT, **LIMITS)
        found.append(listed(mixed(encoding, [source], seed=1, strict=False, observer=recorder)))

    first, second = Slow(), Second()
    thread = threading.Thread(target=work, args=[first])
    thread.start()
    assert reached.wait(20)
    work(second)
    thread.join()
    assert (first.titles, second.titles) == (["tokenise"], [])
    assert second.notices[0] == "another job is tokenising the same data; waiting for it"
    assert found[0] == found[1]


def test_without_locks_the_one_that_comes_first_stays(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, other = write(tmp_path / "a.jsonl"), []

    def unlocked(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    class Overtaken(RecordingObserver):
        def begin(self, title: str, total: int | None = None, done: int = 0) -> None:
            super().begin(title, total, done)
            other.append(listed(take(source)[0]))

    monkeypatch.setattr("fcntl.flock", unlocked)
    encoding, recorder = PairEncoding(CHAT, **LIMITS), Overtaken()
    found = mixed(encoding, [source], seed=1, strict=False, observer=recorder)
    assert [listed(found)] == other and len(entries(home)) == 1
    assert not list(home.glob("data/.*.tmp"))


def test_the_cache_lies_beside_the_hub_s_unless_it_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert cache.folder() == tmp_path / "cache"
    monkeypatch.delenv(cache.VARIABLE)
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "hf"))
    assert cache.folder() == tmp_path / "hf" / "denserl"


def test_another_mapping_of_the_same_rows_is_another_entry(tmp_path: Path, home: Path) -> None:
    rows = [{"q": f"q{n}", "a": "one", "b": "two", "better": n % 2} for n in range(6)]
    source = write(tmp_path / "a.jsonl", rows)
    columns = Columns(prompt="q", answers=("a", "b"), better="better", better_values="index-from-0")
    other = replace(columns, answers=("b", "a"))
    for number, changed in enumerate(
        (
            {"columns": columns},
            {"columns": other},
            {"columns": other, "roles": {"x": "user"}},
            {"columns": other, "ties": "keep-as-half"},
        ),
        1,
    ):
        found, _ = take(replace(source, **changed))
        assert len(found.rows) == 6 and len(entries(home)) == number
        again, recorder = take(replace(source, **changed))
        assert listed(again) == listed(found) and recorder.titles == []
    one, two = (take(replace(source, columns=c))[0].rows[0] for c in (columns, other))
    assert one.chosen.tolist() == two.rejected.tolist() != one.rejected.tolist()


def test_rows_of_a_group_and_pairs_of_a_row_are_kept_as_they_are_read(
    tmp_path: Path, home: Path
) -> None:
    rows = [{"prompt": f"q{n % 4}", "completion": f"c{n}", "label": n % 3 == 0} for n in range(24)]
    source = replace(write(tmp_path / "a.jsonl", rows), format="kto", ties="keep-as-half")
    for limit in (None, 3):
        drawn = replace(source, max_samples=limit)
        read = read_pairs([drawn], seed=1)
        direct = encode_pairs(CHAT, read.pairs, **LIMITS)
        for _ in range(2):
            found, _ = take(drawn)
            assert [plain(one) for one in found.rows] == [plain(one) for one in direct.rows]
        assert len({pair.origin for pair in read.pairs}) == (limit or 4)
