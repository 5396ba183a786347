from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from denserl_cli.core.chat.format import ChatFormat
from denserl_cli.core.data.arrow_rows import StepRows
from denserl_cli.core.data.conversations import Steps, as_steps
from denserl_cli.core.data.encoding import StepEncoding
from denserl_cli.core.data.kinds import all_steps, has_steps
from denserl_cli.core.data.local_files import Row
from denserl_cli.core.data.row_formats import RowReader
from denserl_cli.core.data.steps import EncodedStepRow, step_targets
from denserl_cli.core.data.unusable import UnusableRow
from denserl_cli.core.errors import DenserlError
from denserl_cli.core.recipe.data_formats import row_mappings
from denserl_cli.core.recipe.resolved import ResolvedSegmentation
from denserl_cli.core.recipe.schema import Columns, Source
from denserl_cli.core.segmentation_rules import Cutter
from tests.core.fake_tokenizers import byte_tokenizer, load
from tests.fakes import bot, user

GOOD = {"prompt": "q", "completions": ["a", "b"], "labels": [True, False]}
STEPS = (
    "First, 2 + 2 = 4.",
    "  Indented: naïve 你好 🙂",
    "\n\nAfter blank lines, **bold**:",
    "🙂",
    "x = [1,\t2]  ",
    "So the answer is 4.",
)


def read(fields: dict[str, Any], source: Source | None = None) -> Steps:
    mapping = row_mappings(source or Source("rows.jsonl"))[0]
    return as_steps(Row("rows.jsonl:1", fields), RowReader(mapping))[0]


def encode(chat: ChatFormat, *items: Steps, limit: int = 400) -> list[Any]:
    return list(StepEncoding(chat, limit, limit // 2).encode(items))


def item(*steps: str, labels: tuple[float, ...] | None = None) -> Steps:
    messages = [user("How much is 2 + 2?"), bot("\n".join(steps))]
    return Steps(messages, steps, labels or tuple(float(n % 2) for n in range(len(steps))), "f:1")


# reading


def test_steps_and_labels_of_a_row() -> None:
    shares = GOOD | {"labels": [1, 0.25], "prompt": [user("q")], "system": "s"}
    assert read(GOOD) == Steps([user("q"), bot("a\nb")], ("a", "b"), (1.0, 0.0), "rows.jsonl:1")
    assert read(shares).labels == (1.0, 0.25)
    assert [turn["role"] for turn in read(shares).messages] == ["system", "user", "assistant"]
    columns = Columns(prompt="ask", completions="parts[*].text", labels="parts[*].right")
    parts = [{"text": "a", "right": 1}, {"text": "b", "right": 0}]
    found = read({"ask": "q", "parts": parts}, Source("rows.jsonl", columns=columns))
    assert found == read(GOOD)


@pytest.mark.parametrize(
    ("change", "reason", "detail"),
    [
        ({"labels": [True]}, "wrong number of labels", "column labels: found 1 for the 2 steps"),
        ({"completions": [], "labels": []}, "empty completions", "column completions: found an em"),
        ({"labels": None}, "no labels", "found columns prompt, completions, labels"),
        ({"completions": "one text"}, "wrong type", "column completions"),
        ({"completions": ["a", 3]}, "wrong type", r"column completions[1]: found 3"),
        ({"completions": ["a", " \n"]}, "empty step", "column completions[1]"),
        ({"labels": [1, 2]}, "bad label", "column labels[1]: found 2, wanted true, false"),
        ({"labels": [1, -1]}, "bad label", "column labels[1]: found -1"),
        ({"labels": [float("nan"), 1]}, "bad label", "column labels[0]: found nan"),
        ({"labels": [1, None]}, "bad label", "column labels[1]: found None"),
        ({"labels": ["+", "-"]}, "bad label", "column labels[0]: found '+'"),
        ({"prompt": ""}, "no prompt", "prompt"),
        ({"prompt": None}, "no prompt", "prompt"),
        ({"prompt": [user("q"), bot("a")]}, "roles in the wrong order", "ends with an answer"),
        ({"context": "what the question is about"}, "a column is left out", "column context"),
    ],
)
def test_what_makes_a_row_unusable(change: dict[str, Any], reason: str, detail: str) -> None:
    with pytest.raises(UnusableRow) as error:
        read(GOOD | change)
    assert error.value.reason == reason
    assert detail in error.value.detail


def test_sources_of_one_kind(tmp_path: Path) -> None:
    def write(name: str, row: dict[str, Any]) -> Source:
        (tmp_path / name).write_text(json.dumps(row) + "\n")
        return Source(str(tmp_path / name))

    steps = write("steps.jsonl", GOOD)
    pairs = write("pairs.jsonl", {"prompt": "q", "chosen": "a", "rejected": "b"})
    renamed = Source(str(tmp_path / "absent.jsonl"), columns=Columns(completions="parts"))
    assert [has_steps(one) for one in (steps, pairs, renamed)] == [True, False, True]
    assert all_steps([steps, renamed]) and not all_steps([pairs]) and not all_steps([])
    with pytest.raises(DenserlError, match=r"steps.jsonl has steps .*pairs.jsonl has pref"):
        all_steps([pairs, steps])


# the last token of each step


@pytest.mark.parametrize("name", ["phi3-mini", "llama3", "llama3.1"])
def test_ends_on_real_tokenizers(shared: Path, name: str) -> None:
    tokenizer = load(shared / "tokenizers" / name)
    [row] = encode(ChatFormat.of(tokenizer), item(*STEPS))
    assert row.labels.tolist() == [0, 1, 0, 1, 0, 1] and not row.truncated
    segments = np.split(row.response[: row.ends[-1] + 1], row.ends[:-1] + 1)
    texts = [tokenizer.decode(np.concatenate(segments[: n + 1])) for n in range(len(STEPS))]
    for number, text in enumerate(texts):  # whole steps, and nothing of the words after them
        assert text.rstrip() == "\n".join(STEPS[: number + 1]).rstrip()
    assert row.ends[-1] == len(row.response) - 2  # the terminator is no step's


@pytest.mark.parametrize("name", ["phi3-mini", "llama3"])
def test_ends_are_those_of_the_cut_by_lines(shared: Path, name: str) -> None:
    tokenizer = load(shared / "tokenizers" / name)
    rows = encode(ChatFormat.of(tokenizer), item(*STEPS), item("Only one."), item("A.", "B", "C!"))
    cutter = Cutter(ResolvedSegmentation(granularity="segment", cut="newline"), tokenizer)
    for row in rows:
        ids = torch.from_numpy(row.response.astype(np.int64))[None]
        ends = cutter(ids, None, torch.ones_like(ids, dtype=torch.bool), None)
        assert ends.nonzero()[:, 1].tolist() == row.ends.tolist()


def test_a_cut_response_loses_the_labels_of_steps_that_are_not_whole() -> None:
    chat = ChatFormat.of(byte_tokenizer())
    [whole] = encode(chat, item("abc", "def", "ghi"))
    assert np.diff(whole.ends).tolist() == [4, 3]  # a byte each, separators before the last one
    for left, steps in ((10, 2), (9, 2), (8, 1), (5, 1)):
        limit = len(whole.prompt) + left
        [row] = StepEncoding(chat, limit, limit - 2).encode([item("abc", "def", "ghi")])
        assert row.truncated and len(row.response) == left
        assert row.ends.tolist() == whole.ends[:steps].tolist()
        assert len(row.labels) == steps
    limit = len(whole.prompt) + 4
    [none] = StepEncoding(chat, limit, limit - 2).encode([item("abc", "def", "ghi")])
    assert (none.reason, none.origin) == ("no whole step", "f:1")


def test_rows_in_arrow_are_the_same_rows() -> None:
    rows = encode(ChatFormat.of(byte_tokenizer()), item("abc", "de"), item("f", labels=(0.3,)))
    found = StepRows.of(rows)
    assert found.lengths().tolist() == [len(row.prompt) + len(row.response) for row in rows]
    assert found.numbers("ends").tolist() == [2, 1]
    for one, other in zip(found, rows, strict=True):
        assert isinstance(one, EncodedStepRow)
        for name in ("prompt", "response", "ends", "labels"):
            assert getattr(one, name).tolist() == getattr(other, name).tolist()
        assert (one.origin, one.truncated) == (other.origin, other.truncated)
    targets = step_targets(rows, 8)
    assert targets.ends.sum(1).tolist() == [2, 1]
    assert targets.labels[targets.ends].tolist() == pytest.approx([0, 1, 0.3])
