"""Packed sequences: what is where in the row."""

import numpy as np
import torch

from denserl_cli.core.data.batches import EncodedPairRow, collate_sides
from denserl_cli.core.data.packing import pack_sequences, pack_sides, side_batches
from denserl_cli.core.data.sequences import Sequences


def ids(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int32)


def test_prompts_that_recur_are_there_once():
    batch = pack_sequences([[1, 2], [3], [1, 2]], [[4], [5, 6], [7, 8, 9]], pad_id=0)
    packing = batch.packing
    assert packing is not None
    assert batch.input_ids.tolist() == [[1, 2, 4, 7, 8, 9, 3, 5, 6]]
    assert packing.position_ids.tolist() == [[0, 1, 2, 2, 3, 4, 0, 1, 2]]
    assert batch.responses.tolist() == [[4, 0, 0], [5, 6, 0], [7, 8, 9]]
    assert batch.response_mask.sum(1).tolist() == [1, 2, 3]
    assert batch.response_positions.tolist() == [2, 7, 8, 3, 4, 5]
    assert batch.preceding_positions.tolist() == [1, 6, 7, 1, 3, 4]
    assert (packing.own, packing.whole, packing.holders) == ([3, 3, 3], [3, 5, 3], [0, 0, 2])
    assert packing.tokens is not None
    assert packing.tokens.tolist() == [0, 1, 2, 0, 1, 3, 4, 5, 6, 7, 8]
    assert packing.cumulative.tolist() == [[0, 3, 6, 9], [0, 3, 8, 11]]
    assert packing.cumulative.dtype == torch.int32


def test_prompts_that_differ_are_all_there():
    packing = pack_sequences([[1], [2]], [[1], [1, 2]], pad_id=0).packing
    assert packing is not None and packing.tokens is None
    assert packing.own == packing.whole == [2, 3] and packing.holders == [0, 1]


def test_responses_are_those_of_the_padded_batch():
    drawn = np.random.default_rng(0)
    rows = [
        EncodedPairRow(*(drawn.integers(1, 9, size=size) for size in sizes), None, "")
        for sizes in ((3, 2, 5), (1, 4, 1), (6, 1, 1))
    ]
    for numbers in (range(6), (4, 1, 0), (5, 2)):
        packed = pack_sides(rows, numbers, 0)
        padded = collate_sides(rows, numbers, 0)
        assert torch.equal(packed.responses, padded.responses)
        assert torch.equal(packed.response_mask, padded.response_mask)
        for name in ("response_positions", "preceding_positions"):
            found = packed.input_ids.flatten()[getattr(packed, name)]
            assert torch.equal(found, padded.input_ids.flatten()[getattr(padded, name)])


def test_the_sequences_of_a_pair_are_in_one_pass():
    sides = np.array([5, 9, 2, 5, 1, 7])  # of three pairs, 10, 10 and 9 tokens
    sequences = Sequences(np.zeros(3, int), lengths=sides, responses=sides)
    parts = side_batches(sequences, 2, packed=True)
    assert [part.tolist() for part in parts] == [[0, 1, 3, 4], [2, 5]]
    padded = side_batches(sequences, 2, packed=False)
    assert sorted(np.concatenate(padded).tolist()) == list(range(6))
    assert all(len(part) <= 4 for part in padded)
