"""Kinds of files: compressed, CSV, patterns, standard input; and what is refused by name."""

from __future__ import annotations

import bz2
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from denserl_cli.core.data import sources
from denserl_cli.core.data.local_files import Row
from denserl_cli.core.data.skipped import Skipped
from denserl_cli.core.data.sources import open_source, read_source
from denserl_cli.core.errors import DenserlError
from denserl_cli.core.recipe.schema import Source

ROWS = [{"prompt": f"p{place}", "n": place} for place in range(7)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def read(path: Path | str, limit: int | None = None) -> list[Row | Skipped]:
    return list(read_source(Source(str(path), max_samples=limit), np.random.default_rng(0)))


def fields(path: Path | str, limit: int | None = None) -> list[dict[str, object]]:
    return [row.fields for row in read(path, limit) if isinstance(row, Row)]


def test_compressed_files_are_read_like_others(tmp_path: Path) -> None:
    plain = tmp_path / "rows.jsonl"
    plain.write_bytes(LINES)
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(LINES))
    (tmp_path / "rows.json.bz2").write_bytes(bz2.compress(json.dumps(ROWS).encode()))
    with pa.output_stream(tmp_path / "rows.jsonl.zst", compression="zstd") as file:
        file.write(LINES)
    for name in ("rows.jsonl.gz", "rows.jsonl.zst", "rows.json.bz2"):
        path = tmp_path / name
        assert fields(path) == ROWS
        assert fields(path, 3) == fields(plain, 3)
        assert open_source(Source(str(path))).places() == 7
    assert read(tmp_path / "rows.jsonl.gz")[1].origin == f"{tmp_path}/rows.jsonl.gz:2"
    assert open_source(Source(f"{tmp_path}/rows.jsonl.gz")).survey().rows == 7


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.jsonl.zst", "rows.jsonl.bz2"])
@pytest.mark.parametrize(
    "content", [b"no such thing", gzip.compress(LINES, mtime=0)[:30]], ids=["other", "cut off"]
)
def test_a_damaged_archive_is_an_error(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DenserlError, match=name.replace(".", r"\.")):
        read(tmp_path / name)


def test_csv_has_names_in_its_first_line_and_texts_below(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('prompt,chosen,n\n"two\nlines, and a comma",a,1\n\nq,,2\nq,b\n"q ""x""",c,3\n')
    assert read(path) == [
        Row(f"{path}:2", {"prompt": "two\nlines, and a comma", "chosen": "a", "n": "1"}),
        Row(f"{path}:5", {"prompt": "q", "chosen": None, "n": "2"}),
        Skipped(
            f"{path}:6", "wrong number of cells", "found 2 cells, the first line names 3 columns"
        ),
        Row(f"{path}:7", {"prompt": 'q "x"', "chosen": "c", "n": "3"}),
    ]
    assert open_source(Source(str(path))).places() == 4
    (tmp_path / "rows.tsv").write_text("\ufeffprompt\tchosen\nq\ta, b\n", encoding="utf-8")
    assert fields(tmp_path / "rows.tsv") == [{"prompt": "q", "chosen": "a, b"}]
    (tmp_path / "rows.csv.gz").write_bytes(gzip.compress(path.read_bytes()))
    assert fields(tmp_path / "rows.csv.gz") == fields(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a,a\n1,2\n", "names of the columns"),
        (b"prompt;chosen;rejected\nq;a;b\n", "not parted by commas"),
        (b"a,\n1,2\n", "names of the"),
        (b"a\n\xff", "UTF-8"),
    ],
)
def test_a_broken_csv_is_an_error(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "rows.csv").write_bytes(content)
    with pytest.raises(DenserlError, match=message):
        read(tmp_path / "rows.csv")


def test_a_pattern_is_all_its_files_in_their_order(tmp_path: Path) -> None:
    for name, rows in (("b", ROWS[3:]), ("a", ROWS[:3])):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"part-{name}.jsonl").write_text(text)
    (tmp_path / "whole.jsonl").write_bytes(LINES)
    pattern = f"{tmp_path}/part-*.jsonl"
    assert fields(pattern) == ROWS
    assert read(pattern)[3].origin == f"{tmp_path}/part-b.jsonl:1"
    assert all(row.origin.startswith(open_source(Source(pattern)).name) for row in read(pattern))
    for limit in (1, 4, 9):
        assert fields(pattern, limit) == fields(tmp_path / "whole.jsonl", limit)
    survey = open_source(Source(pattern)).survey()
    assert survey.rows == 7
    (tmp_path / "part-b.jsonl").write_bytes(LINES)
    assert open_source(Source(pattern)).survey().identity != survey.identity
    with pytest.raises(DenserlError, match="no file fits"):
        read(f"{tmp_path}/none-*.jsonl")
    (tmp_path / "part-c.xlsx").write_text("x")
    with pytest.raises(DenserlError, match="not a file that is read here"):
        read(f"{tmp_path}/part-*")


class Pipe(io.TextIOWrapper):
    """Standard input with something piped in."""


@pytest.fixture
def piped(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], None]:
    def pipe(content: bytes) -> None:
        sources._standard_input.cache_clear()
        monkeypatch.setattr("sys.stdin", Pipe(io.BytesIO(content)))

    return pipe


def test_standard_input_can_be_read_several_times(piped: Callable[[bytes], None]) -> None:
    piped(LINES)
    assert fields("-") == ROWS == fields("-")
    assert read("-")[1].origin == "stdin:2"
    assert len(fields("-", 2)) == 2


def test_nothing_piped_in_is_an_error(
    piped: Callable[[bytes], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    piped(b"")
    monkeypatch.setattr(Pipe, "isatty", lambda _: True)
    with pytest.raises(DenserlError, match="nothing is piped in"):
        read("-")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv"])
def test_utf16_is_told_by_name(tmp_path: Path, encoding: str, name: str) -> None:
    (tmp_path / name).write_bytes(LINES.decode().encode(encoding))
    with pytest.raises(DenserlError, match=r"is UTF-16, not UTF-8") as caught:
        read(tmp_path / name)
    assert caught.value.hint is not None and "iconv" in caught.value.hint


@pytest.mark.parametrize(
    ("address", "advice"),
    [
        (
            "https://example.org/a/rows.jsonl",
            "curl -L -o rows.jsonl https://example.org/a/rows.jsonl",
        ),
        ("s3://bucket/rows.parquet", "aws s3 cp s3://bucket/rows.parquet rows.parquet"),
        ("hf://datasets/owner/name", "owner/name"),
    ],
)
def test_an_address_is_told_what_to_do(address: str, advice: str) -> None:
    with pytest.raises(DenserlError, match="addresses are not read here") as caught:
        read(address)
    assert caught.value.hint is not None and advice in caught.value.hint
