from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from denserl_cli.core.data.batches import SequenceBatch, collate_sequences
from denserl_cli.core.scoring import segment_cache
from denserl_cli.core.scoring.scorer import ScoredBatch
from denserl_cli.core.scoring.segment_cache import SegmentCache
from tests.fakes import RecordingObserver

LENGTHS = np.array([3, 17, 1, 8])
RESPONSES = [np.arange(length) + 5 * (place + 1) for place, length in enumerate(LENGTHS)]


class Counting:
    """Each even id ends a segment."""

    def __init__(self) -> None:
        self.batches = 0

    def __call__(self, batch: SequenceBatch) -> ScoredBatch:
        self.batches += 1
        return ScoredBatch(batch.response_mask & (batch.responses % 2 == 0), None, None, None, {})


def batch(*numbers: int) -> tuple[SequenceBatch, np.ndarray]:
    made = collate_sequences([[1]] * len(numbers), [RESPONSES[n] for n in numbers], 0)
    return made, np.array(numbers)


def opened(file: Path, recorder: RecordingObserver | None = None) -> tuple[SegmentCache, Counting]:
    scorer = Counting()
    return SegmentCache(scorer, LENGTHS, file, recorder or RecordingObserver()), scorer  # type: ignore[arg-type]


def test_what_was_found_once_is_not_asked_again(tmp_path: Path):
    file = tmp_path / "new" / "file"
    first, scorer = opened(file)
    for numbers in ((0, 1), (3, 2), (2, 0, 1, 3), (1,)):
        made = batch(*numbers)
        assert torch.equal(first(*made), Counting()(made[0]).ends)
    assert scorer.batches == 2
    again, scorer = opened(file)
    made = batch(1, 3)
    assert torch.equal(again(*made), Counting()(made[0]).ends) and scorer.batches == 0
    assert file.stat().st_size == sum(-(-length // 8) + 4 for length in LENGTHS)


def test_what_is_known_stays_as_it_was_first_found(tmp_path: Path):
    first, _ = opened(tmp_path / "file")
    known = first(*batch(1))
    later, scorer = opened(tmp_path / "file")
    scorer.__class__ = type("Other", (Counting,), {
        "__call__": lambda self, made: ScoredBatch(
            made.response_mask.clone(), None, None, None, {}
        )
    })  # fmt: skip
    ends = later(*batch(1, 3))
    assert torch.equal(ends[:1], known) and ends[1, :8].all()


@pytest.mark.parametrize("damage", ["zeros", "flipped", "short"])
def test_a_record_that_is_not_whole_is_made_again(tmp_path: Path, damage: str):
    file = tmp_path / "file"
    first, _ = opened(file)
    expected = first(*batch(0, 1, 2, 3))
    content = bytearray(file.read_bytes())
    if damage == "short":
        content = content[:-1]
    elif damage == "zeros":
        content[5:12] = bytes(7)
    else:
        content[6] ^= 4
    file.write_bytes(content)
    again, scorer = opened(file)
    assert torch.equal(again(*batch(0, 1, 2, 3)), expected) and scorer.batches == 1
    assert torch.equal(opened(file)[0](*batch(0, 1, 2, 3)), expected)


def test_all_processes_ask_or_none(tmp_path: Path, monkeypatch):
    first, _ = opened(tmp_path / "file")
    expected = first(*batch(0, 1))
    monkeypatch.setattr(segment_cache, "any_rank", lambda missing: True)
    again, scorer = opened(tmp_path / "file")
    assert torch.equal(again(*batch(0, 1)), expected) and scorer.batches == 1


def test_where_nothing_can_be_kept_a_notice_says_so(tmp_path: Path, monkeypatch):
    recorder = RecordingObserver()
    (tmp_path / "file").mkdir()
    cache, scorer = opened(tmp_path / "file", recorder)
    first = cache(*batch(0, 1))
    assert torch.equal(cache(*batch(0, 1)), first) and scorer.batches == 2
    full, scorer = opened(tmp_path / "full", recorder)

    def no_room(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", no_room)
    assert torch.equal(full(*batch(0, 1)), first)
    assert torch.equal(full(*batch(0, 1)), first) and scorer.batches == 2
    assert [notice.split(":")[0] for notice in recorder.notices] == [
        f"segments are not kept in {segment_cache.cache.folder()} ({reason})"
        for reason in ("Is a directory", "No space left on device")
    ]
