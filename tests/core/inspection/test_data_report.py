"""What `denserl data` counts, by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from denserl_cli.core.chat.format import ChatFormat
from denserl_cli.core.inspection.data_report import prompt_keys, report_on
from denserl_cli.core.inspection.data_tally import Limits
from denserl_cli.core.recipe.schema import Source
from tests.core.fake_tokenizers import byte_tokenizer

ROWS: list[dict[str, Any]] = [
    {"prompt": "q", "chosen": "long answer", "rejected": "no", "n": 1},
    {"prompt": "q", "chosen": "long answer", "rejected": "no", "n": None},
    {"prompt": "r", "chosen": "yes", "rejected": "longer"},
    {"prompt": "s", "chosen": "same", "rejected": "same"},
    {"prompt": "t", "chosen": "abc", "rejected": "abd"},
]


def write(path: Path, rows: list[dict[str, Any]]) -> Source:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Source(str(path))


def test_rows_are_counted_and_described(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", ROWS)
    report = report_on(source, evaluation=prompt_keys([write(tmp_path / "b.jsonl", ROWS[2:3])]))
    assert (report.kind, report.rows, report.usable, report.prompts) == ("pairs", 5, 4, 3)
    assert [row.reason for row in report.skipped] == ["identical answers"]
    assert report.columns["n"].filled == 1 and report.columns["n"].types == {"number": 1}
    assert report.columns["prompt"].types == {"text": 5}
    assert (report.duplicates, report.shared_prompts) == (1, 1)
    assert report.longer_is_better == 2 / 3
    assert report.lengths["chosen"] == (7.0, 11.0, 11)
    assert report.unit == "characters" and report.cut is None
    assert report.example is not None and report.example.prompt == "[user] q"
    document = json.loads(json.dumps(report.document()))
    assert document["skipped"]["identical answers"]["rows"] == 1


def test_tokens_are_those_of_training(tmp_path: Path) -> None:
    source, chat = write(tmp_path / "a.jsonl", ROWS), ChatFormat.of(byte_tokenizer())
    report = report_on(source, chat=chat, limits=Limits(10, 4, 50))
    prompt, answer = chat.encode_prompt([{"role": "user", "content": "q"}]), "long answer"
    assert report.unit == "tokens" and report.example is not None
    assert report.example.prompt_tokens == len(prompt[-4:])
    assert report.example.last_prompt_ids == prompt[-4:]
    whole = chat.encode_response(answer)
    assert len(prompt) + len(whole) > 10 > len(prompt) + len(chat.encode_response("abc")) - 1
    assert report.example.first_answer_ids["chosen"] == [*whole[:5], chat.terminator_id]
    assert report.lengths["chosen"].longest == 6
    assert report.cut == 3


def test_a_known_format_is_recognised_and_said(tmp_path: Path) -> None:
    rows = [{"system": "", "question": f"q{n}", "chosen": "a", "rejected": "b"} for n in range(3)]
    source = write(tmp_path / "a.jsonl", rows)
    report = report_on(source)
    assert (report.format, report.recognized, report.usable) == ("orca-dpo", True, 3)
    assert report.mapping["columns"]["prompt"] == "question"
    named = report_on(replace(source, format="orca-dpo"))
    assert (named.format, named.recognized, named.mapping) == ("orca-dpo", False, report.mapping)


def test_prompts_alone_are_prompts(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [{"prompt": "q", "answer": "4 2"}, {"prompt": "q"}, {}])
    report = report_on(source)
    assert (report.kind, report.usable, report.prompts, report.duplicates) == ("prompts", 2, 1, 1)
    assert report.remarks[0].startswith("read as prompts, for no row gives a pair: 3 x no chosen")
    assert report_on(source, prompts_only=True).remarks == []
    assert report.longer_is_better is None and set(report.lengths) == {"prompt"}


def test_nothing_usable_is_described_all_the_same(tmp_path: Path) -> None:
    report = report_on(write(tmp_path / "a.jsonl", [{"x": 1}, {"x": [1]}]))
    assert (report.rows, report.usable, report.example) == (2, 0, None)
    assert report.columns["x"].types == {"number": 1, "list of number": 1}
    assert len(report.skipped) == 2
