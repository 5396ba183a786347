from __future__ import annotations

import json
from pathlib import Path

import datasets
import numpy as np
import pytest
from datasets import Dataset, DatasetDict

from denserl_cli.core.data.local_files import Row
from denserl_cli.core.data.skipped import Skipped, check_usable, skipped_report, write_skipped
from denserl_cli.core.data.sources import read_source
from denserl_cli.core.errors import DenserlError
from denserl_cli.core.recipe.schema import Source

ROWS = [{"prompt": f"p{i}"} for i in range(6)]


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def read(path: Path | str, **options: object) -> list[Row | Skipped]:
    return list(read_source(Source(str(path), **options), rng()))  # type: ignore[arg-type]


def test_json_lines_carry_their_line_numbers(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\n{"a": "\xc3\xa9"}')
    assert read(path) == [Row(f"{path}:1", {"a": 1}), Row(f"{path}:3", {"a": "é"})]


def test_broken_lines_are_skipped_each_with_its_place_and_reason(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    lines = [b'{"a": 1}', b'{"a": ', b'{"a": "\xff"}', b"[1]", b"[" * 100_000, b'{"a": 2}']
    path.write_bytes(b"\n".join(lines) + b"\n")
    rows = read(path)
    assert [row for row in rows if isinstance(row, Row)] == [
        Row(f"{path}:1", {"a": 1}),
        Row(f"{path}:6", {"a": 2}),
    ]
    assert [row[:2] for row in rows if isinstance(row, Skipped)] == [
        (f"{path}:2", "broken JSON"),
        (f"{path}:3", "not UTF-8"),
        (f"{path}:4", "not an object"),
        (f"{path}:5", "broken JSON"),
    ]


@pytest.mark.parametrize(
    "text", [json.dumps(ROWS), json.dumps({"data": ROWS}), "\n".join(map(json.dumps, ROWS))]
)
def test_json_is_a_list_an_object_with_data_or_lines(tmp_path: Path, text: str) -> None:
    path = tmp_path / "rows.json"
    path.write_text(text)
    assert [row.fields for row in read(path) if isinstance(row, Row)] == ROWS


def test_a_json_row_that_is_no_object_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text('[{"a": 1}, 2]')
    assert [row[:2] for row in read(path)] == [
        (f"{path}[0]", {"a": 1}),
        (f"{path}[1]", "not an object"),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"a": 1},\n{"a" 2}]', r"rows\.json:2: broken JSON"),
        (b'["\xff"]', "not UTF-8"),
        (b'{"rows": []}', "neither a list"),
        (b"", r"rows\.json:1: broken JSON"),
    ],
)
def test_a_json_file_that_cannot_be_read_is_an_error(
    tmp_path: Path, content: bytes, message: str
) -> None:
    (tmp_path / "rows.json").write_bytes(content)
    with pytest.raises(DenserlError, match=message):
        read(tmp_path / "rows.json")


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    Dataset.from_list(ROWS).to_parquet(path)
    assert read(path) == [Row(f"{path}[{i}]", row) for i, row in enumerate(ROWS)]
    path.write_bytes(b"no parquet")
    with pytest.raises(DenserlError, match="not a readable parquet file"):
        read(path)


def test_saved_data_sets_with_and_without_splits(tmp_path: Path) -> None:
    rows = Dataset.from_list(ROWS)
    rows.save_to_disk(tmp_path / "plain")
    DatasetDict(train=rows, test=rows.select([4])).save_to_disk(tmp_path / "splits")
    DatasetDict(test=rows.select([4])).save_to_disk(tmp_path / "one")
    DatasetDict(a=rows, b=rows).save_to_disk(tmp_path / "two")
    assert [row.fields for row in read(tmp_path / "plain") if isinstance(row, Row)] == ROWS
    assert len(read(tmp_path / "splits")) == 6
    assert read(tmp_path / "splits", split="test") == [
        Row(f"{tmp_path / 'splits'}:test[0]", {"prompt": "p4"})
    ]
    assert len(read(tmp_path / "one")) == 1
    for folder, split in (("splits", "dev"), ("two", None)):
        with pytest.raises(DenserlError, match="has no split") as caught:
            read(tmp_path / folder, split=split)
        assert caught.value.hint is not None and "one of: " in caught.value.hint
    with pytest.raises(DenserlError, match="has no splits"):
        read(tmp_path / "plain", split="test")


def test_max_samples_draws_with_the_seed_and_keeps_the_order(tmp_path: Path) -> None:
    rows = Dataset.from_list([{"n": i} for i in range(100)])
    rows.to_json(tmp_path / "rows.jsonl")
    rows.to_parquet(tmp_path / "rows.parquet")
    rows.save_to_disk(tmp_path / "rows")
    (tmp_path / "rows.json").write_text(json.dumps(rows.to_list()))
    drawn = []
    for name in ("rows.jsonl", "rows.parquet", "rows.json", "rows"):
        found = [r.fields["n"] for r in read(tmp_path / name, max_samples=7) if isinstance(r, Row)]
        assert len(found) == 7 and found == sorted(set(found)) and found != list(range(7))
        drawn.append(found)
    assert all(found == drawn[0] for found in drawn)
    assert len(read(tmp_path / "rows.jsonl", max_samples=1000)) == 100


@pytest.mark.parametrize("name", ["none.jsonl", "none/none.parquet", "/none/x", "./none"])
def test_a_missing_path_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(DenserlError, match="no such file or folder"):
        read(tmp_path / name if not name.startswith(".") else name)


def test_other_files_and_splits_of_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.xlsx").write_text("a,b\n")
    with pytest.raises(DenserlError, match=r"rows\.xlsx: not a file that is read here") as caught:
        read(tmp_path / "rows.xlsx")
    assert caught.value.hint is not None and ".parquet" in caught.value.hint
    (tmp_path / "rows.jsonl").write_text("{}")
    for options in ({"split": "test"}, {"subset": "x"}):
        with pytest.raises(DenserlError, match="no splits or subsets"):
            read(tmp_path / "rows.jsonl", **options)
    assert len(read(tmp_path / "rows.jsonl", split="train")) == 1


def test_a_file_that_may_not_be_read_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rows.jsonl").write_text("{}")

    def refuse(path: Path, mode: str) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DenserlError, match=r"rows\.jsonl: Permission denied"):
        read(tmp_path / "rows.jsonl")


def test_a_folder_of_files_is_read_by_the_library(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    Dataset.from_list(ROWS).to_parquet(tmp_path / "set" / "train.parquet")
    assert [row.fields for row in read(tmp_path / "set") if isinstance(row, Row)] == ROWS
    (tmp_path / "empty").mkdir()
    with pytest.raises(DenserlError, match="cannot read"):
        read(tmp_path / "empty")


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (ConnectionError("Couldn't reach 'a/b' on the Hub"), "check the network"),
        (datasets.exceptions.DatasetNotFoundError("'a/b' is a gated dataset"), "hf auth login"),
        (datasets.exceptions.DatasetNotFoundError("'a/b' doesn't exist"), "check path"),
        (ValueError("BuilderConfig 'x' not found. Available: ['y']"), "check path and subset"),
    ],
)
def test_what_the_hub_refuses_is_an_error_with_advice(
    monkeypatch: pytest.MonkeyPatch, error: Exception, advice: str
) -> None:
    def load_dataset(path: str, name: str | None) -> None:
        assert (path, name) == ("a/b", "x")
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DenserlError, match="cannot read a/b: ") as caught:
        read("a/b", subset="x")
    assert str(error) in caught.value.message
    assert caught.value.hint is not None and advice in caught.value.hint


def test_a_data_set_of_the_hub_is_read_by_its_split(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = DatasetDict(train=Dataset.from_list(ROWS), test=Dataset.from_list(ROWS[:2]))
    monkeypatch.setattr(datasets, "load_dataset", lambda path, name: loaded)
    assert [row.origin for row in read("a/b", split="test")] == ["a/b:test[0]", "a/b:test[1]"]


# rows that cannot be used

SKIPPED = [
    *(Skipped(f"a:{n}", "broken JSON", "why") for n in range(1, 6)),
    Skipped("b:1", "empty answer", "chosen"),
]


def test_the_report_counts_by_reason_and_names_the_first_places() -> None:
    assert skipped_report([SKIPPED[-1], *SKIPPED[:-1]]) == [
        "5 x broken JSON: a:1, a:2, a:3 and 2 more (why)",
        "1 x empty answer: b:1 (chosen)",
    ]
    assert skipped_report([]) == []


def test_unusable_rows_stop_only_where_they_must() -> None:
    check_usable(3, SKIPPED, strict=False)
    check_usable(3, [], strict=True)
    with pytest.raises(DenserlError, match=r"6 rows cannot be used\n5 x broken JSON: a:1"):
        check_usable(3, SKIPPED, strict=True)
    with pytest.raises(DenserlError, match=r"no usable row\n5 x broken JSON: a:1"):
        check_usable(0, SKIPPED, strict=False)


def test_skipped_rows_are_written_as_json_lines(tmp_path: Path) -> None:
    write_skipped(tmp_path / "new" / "skipped.jsonl", SKIPPED)
    lines = (tmp_path / "new" / "skipped.jsonl").read_text().splitlines()
    assert json.loads(lines[-1]) == {"origin": "b:1", "reason": "empty answer", "detail": "chosen"}
    assert len(lines) == 6
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["skipped.jsonl"]
