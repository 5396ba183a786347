"""Ranked answers of a row as one ranking: how it is read, kept and numbered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from denserl_cli.core.chat.format import ChatFormat
from denserl_cli.core.data.arrow_rows import PairRows, sequences_of
from denserl_cli.core.data.batches import EncodedPairRow, collate_sides
from denserl_cli.core.data.conversations import read_pairs
from denserl_cli.core.data.encoding import encode_pairs
from denserl_cli.core.data.sequences import every_pair
from denserl_cli.core.errors import DenserlError
from denserl_cli.core.recipe import load_recipe
from denserl_cli.core.recipe.schema import Columns, Source
from tests.core.fake_tokenizers import PLAIN, byte_tokenizer

SCORED = Columns(prompt="prompt", answers="answers[*]", scores="scores[*]")


def write(path: Path, *rows: dict[str, Any]) -> Source:
    lines = [json.dumps({"prompt": "q"} | row) + "\n" for row in rows]
    path.write_text("".join(lines))
    return Source(str(path), columns=SCORED, pairs="ranking")


def texts(pair: Any) -> list[str]:
    sides = (pair.chosen, *pair.others, pair.rejected)
    assert all(side[:-1] == [{"role": "user", "content": "q"}] for side in sides)
    return [side[-1]["content"] for side in sides]


def row(prompt: int, *lengths: int) -> EncodedPairRow:
    """A row with answers of these lengths, the best first; the k-th best is made of k."""
    best, *others, worst = (np.full(n, k, np.int32) for k, n in enumerate(lengths, 1))
    return EncodedPairRow(np.zeros(prompt, np.int32), best, worst, None, "f:1", others=(*others,))


def test_a_row_is_one_ranking_best_first(tmp_path: Path) -> None:
    source = write(
        tmp_path / "rows.jsonl",
        {"answers": ["b", "a", "d", "c"], "scores": [3, 4.5, "-1", 0]},
        {"answers": ["y", "x"], "scores": [0, 1]},
    )
    assert [texts(pair) for pair in read_pairs([source], seed=0).pairs] == [
        ["a", "b", "c", "d"],
        ["x", "y"],
    ]


def test_rows_with_one_answer_each_and_ranks_make_a_ranking(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    ranks = {"b": 2, "a": 1, "c": 3}
    rows = [{"prompt": "q", "text": text, "rank": rank} for text, rank in ranks.items()]
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    columns = Columns(prompt="prompt", answers="text", rank="rank")
    source = Source(str(path), columns=columns, pairs="ranking", group_by="prompt")
    (pair,) = read_pairs([source], seed=0).pairs
    assert texts(pair) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("answers", "scores", "reason", "detail"),
    [
        (["a"], [1], "one answer alone", "answers"),
        (["a", "b", "c"], [1, 2], "wrong number of scores", "found 2 for 3"),
        (["a", "b", "c"], [1, float("nan"), 2], "bad scores", "wanted a number"),
        (["a", "b", "c"], [1, 1, 2], "tie", "2 of 3 answers are equally good"),
        (["a", "b", "a"], [1, 2, 3], "identical answers", ""),
        (["a", None, "b"], [1, 2, 3], "no answers[*]", ""),
    ],
)
def test_rows_that_are_no_ranking_are_named(
    tmp_path: Path, answers: list[Any], scores: list[Any], reason: str, detail: str
) -> None:
    good = {"answers": ["a", "b"], "scores": [1, 2]}
    source = write(tmp_path / "rows.jsonl", good, {"answers": answers, "scores": scores})
    found = read_pairs([source], seed=0)
    assert len(found.pairs) == 1
    (skipped,) = found.skipped
    assert skipped.origin == f"{tmp_path}/rows.jsonl:2"
    assert skipped.reason == reason and detail in skipped.detail
    if reason != "tie":
        with pytest.raises(DenserlError, match=r"rows\.jsonl:2"):
            read_pairs([source], seed=0, strict=True)


def test_all_answers_are_cut_together(tmp_path: Path) -> None:
    chat = ChatFormat.of(byte_tokenizer(PLAIN))
    source = write(
        tmp_path / "rows.jsonl",
        {"answers": ["a", "b" * 90, "cc"], "scores": [3, 2, 1]},
        {"answers": ["a" * 90, "a" * 91, "b"], "scores": [3, 2, 1]},
    )
    pairs = read_pairs([source], seed=0).pairs
    found = encode_pairs(chat, pairs, max_length=40, max_prompt_length=20)
    (kept,) = found.rows
    assert kept.truncated and len(kept.prompt) + len(kept.others[0]) == 40
    assert kept.others[0][-1] == chat.terminator_id
    assert [one.reason for one in found.skipped] == ["identical answers"]


def test_arrow_keeps_rankings_in_any_order() -> None:
    held = [row(1, 2, 3, 4), row(2, 5, 6), row(3, 1, 2, 3, 4), row(1, 7, 8)]
    rows = PairRows.of(held)
    for order in ([0, 1, 2, 3], [2, 0], [3, 1], [2, 2, 1, 0]):
        taken, plain = rows.take(np.array(order)), [held[n] for n in order]
        for one, other in zip(taken, plain, strict=True):
            assert [a.tolist() for a in one.others] == [a.tolist() for a in other.others]
        first, second = sequences_of(taken), sequences_of(plain)
        for name in ("others", "lengths", "responses", "tokens", "owners"):
            assert getattr(first, name).tolist() == getattr(second, name).tolist()
    both = sequences_of(rows[2:].followed_by(PairRows.of(held[:1])))
    assert both.responses.tolist() == [1, 7, 2, 4, 8, 4, 2, 3, 3]
    changed = [row(1, 2, 9, 4), *held[1:]]
    assert PairRows.of(changed).identity() != rows.identity() == PairRows.of(held).identity()


def test_sequences_have_the_numbers_that_their_rows_alone_give_them() -> None:
    held = [row(1, 2, 3, 4), row(2, 5, 6), row(3, 1, 2, 3, 4)]
    sequences = sequences_of(held)
    whole = collate_sides(held, range(9), 0)
    assert whole.response_mask.sum(1).tolist() == sequences.responses.tolist()
    assert whole.responses[:, 0].tolist() == [1, 1, 1, 3, 2, 4, 2, 2, 3]
    for rows in ([2, 0], [1], [0, 1, 2]):
        batch = collate_sides([held[n] for n in rows], range(len(sequences.of(np.array(rows)))), 0)
        numbers = sequences.of(np.array(rows))
        assert batch.response_mask.sum(1).tolist() == sequences.responses[numbers].tolist()
    for numbers in ([8, 0, 5], [7, 6], [4, 1]):
        part, local = sequences.part(held, np.array(numbers))
        batch = collate_sides(part, local, 0)
        assert batch.response_mask.sum(1).tolist() == sequences.responses[numbers].tolist()
        assert len(part) == len({int(sequences.owners[n]) for n in numbers})


def test_every_two_answers_are_a_pair() -> None:
    held = [row(1, 2, 3, 4), row(2, 5, 6)]
    sequences = sequences_of(held)
    assert sequences.pairs().tolist() == [[0, 4], [0, 2], [4, 2], [1, 3]]
    lengths = [(len(one.chosen), len(one.rejected)) for one in every_pair(held)]
    assert lengths == [tuple(sequences.responses[pair]) for pair in sequences.pairs()]
    assert sequences_of(held[1:]).pairs().tolist() == [[0, 1]]


@pytest.mark.parametrize(
    ("setting", "line"),
    [
        ("reward_model.target_margin=0.5", r"reward_model\.target_margin: .*preferences\[0\]"),
        ("reward_model.label_smoothing=0.1", r"reward_model\.label_smoothing: .*preferences\[0\]"),
        (
            "data.preferences=[{path: x.jsonl, pairs: ranking, columns: {margin: m}}]",
            r"reward_model\.margins: target .*preferences\[0\]\.pairs: ranking",
        ),
        (
            "data.preferences=[{path: x.jsonl, pairs: ranking, ties: keep-as-half}]",
            r"data\.preferences\[0\]\.ties: a ranking",
        ),
    ],
)
def test_what_has_no_meaning_for_rankings_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str, line: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.jsonl").touch()
    source = "data.preferences=[{path: x.jsonl, pairs: ranking}]"
    load_recipe("sandbox-segment", ["sandbox=null", "model.path=owner/name", source])
    with pytest.raises(DenserlError, match=line):
        load_recipe("sandbox-segment", ["sandbox=null", "model.path=owner/name", source, setting])
