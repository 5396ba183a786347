"""Rows that are made when they are asked for, against rows that are held."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import pytest

from denserl_cli.core.data.arrow_rows import Batch, PairRows, PromptRows, pair_lengths, sequences_of
from denserl_cli.core.data.batches import EncodedPairRow
from denserl_cli.core.data.conversations import Prompt
from denserl_cli.core.data.splitting import held_out


def ids(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int32)


def pair(prompt: int, chosen: int = 1, rejected: int = 1, place: int = 0) -> EncodedPairRow:
    responses = (ids(*range(chosen)), ids(*range(rejected)))
    return EncodedPairRow(ids(prompt), *responses, 0.5 if place else None, f"f:{place}")


def places(rows: Sequence[EncodedPairRow]) -> list[str]:
    return [row.origin for row in rows]


def test_a_row_comes_back_as_it_was() -> None:
    row = EncodedPairRow(
        *(ids(1, 2), ids(3), ids(), 0.25, "f:7", b"0123456789abcdef"), subset="é", truncated=True
    )
    prompt = Prompt([{"role": "user", "content": "\ud83d"}], "f:1", {"n": [1.5]}, ids(9), True)
    (back,), (prompt_back,) = PairRows.of([row]), PromptRows.of([prompt])
    for one, other in ((row, back), (prompt, prompt_back)):
        for name, value in vars(one).items():
            found = getattr(other, name)
            if isinstance(value, np.ndarray):
                assert found.tolist() == value.tolist() and found.dtype == np.int32
            else:
                assert found == value


def test_what_json_has_no_word_for_comes_as_text() -> None:
    prompt = Prompt([], "f:1", {"on": np.datetime64("2025-01-02")}, ids(1))
    assert PromptRows.of([prompt])[0].row == {"on": "2025-01-02"}


def test_rows_are_numbered_over_batches_and_origins_begin_with_their_source() -> None:
    parts = [[pair(1, place=1), pair(2, place=2)], [], [pair(3, place=3)]]
    batches = [Batch(f"s{n}/", PairRows.batch(rows)) for n, rows in enumerate(parts)]
    rows = PairRows(batches)
    assert places(rows) == ["s0/f:1", "s0/f:2", "s2/f:3"] and len(rows) == 3
    assert places(rows[1:]) == ["s0/f:2", "s2/f:3"] and rows[-1].origin == "s2/f:3"
    assert places(rows.take(np.array([2, 0, 2]))) == ["s2/f:3", "s0/f:1", "s2/f:3"]
    with pytest.raises(IndexError):
        rows[3]
    assert not rows[:0] and list(rows[:0]) == []


def test_sequences_follow_each_other_whether_they_share_a_file_or_not() -> None:
    rows = PairRows.of([pair(n, place=n) for n in range(4)])
    others = PairRows.of([pair(9, place=9)])
    assert places(rows[2:].followed_by(rows[:1])) == ["f:2", "f:3", "f:0"]
    assert places(rows[2:].followed_by(others)) == ["f:2", "f:3", "f:9"]
    assert pair_lengths(rows[2:].followed_by(others)).tolist() == [[1, 1, 1]] * 3


def test_lengths_are_those_of_the_rows() -> None:
    held = [pair(1, 2, 5), pair(1, 4, 3)]
    rows = PairRows.of(held)
    assert pair_lengths(rows).tolist() == pair_lengths(held).tolist() == [[1, 2, 5], [1, 4, 3]]
    assert sequences_of(rows).lengths.tolist() == [3, 5, 6, 4]
    assert sequences_of([]).lengths.tolist() == []


def test_groups_are_numbered_by_first_use() -> None:
    rows = PairRows.of([pair(prompt) for prompt in (7, 3, 7, 5)])
    assert rows.groups().tolist() == [0, 1, 0, 2]
    assert rows.take(np.array([3, 1, 2, 0])).groups().tolist() == [0, 1, 2, 2]


def test_the_same_groups_are_held_out_as_with_a_plain_loop() -> None:
    def plainly(groups: np.ndarray, count: int, seed: int) -> set[int]:
        members = defaultdict(list)
        for place, group in enumerate(groups):
            members[group].append(place)
        target, held = min(count, len(groups) // 10), set[int]()
        names = list(members)
        for draw in np.random.default_rng(seed).permutation(len(names)):
            if len(held) + len(members[names[draw]]) <= target:
                held.update(members[names[draw]])
        return held

    rng = np.random.default_rng(1)
    for seed in range(20):
        _, groups = np.unique(rng.integers(0, 40, 300), return_inverse=True)
        rows = PairRows.of([pair(int(group)) for group in groups])
        found = held_out(rows.groups(), 25, seed)
        assert set(np.flatnonzero(found)) == plainly(groups, 25, seed)
