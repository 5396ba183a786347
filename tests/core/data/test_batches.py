from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch

from denserl_cli.core.data.batches import (
    EncodedPairRow,
    by_length,
    collate_sequences,
    collate_sides,
    forward_passes,
    global_batches,
    margins,
    micro_batches,
    padded_width,
    pair_batches,
)


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def row(
    prompt: np.ndarray, chosen: np.ndarray, rejected: np.ndarray, margin: float | None = None
) -> EncodedPairRow:
    return EncodedPairRow(prompt, chosen, rejected, margin, "here:1")


def test_an_epoch_shows_every_row_once() -> None:
    batches = global_batches(6, 2, steps=3, seed=3)
    assert [len(batch) for batch in batches] == [2, 2, 2]
    assert sorted(np.concatenate(batches)) == list(range(6))


def test_the_rest_of_an_epoch_goes_into_the_next_and_the_last_rest_is_dropped() -> None:
    batches = global_batches(5, 2, steps=7, seed=3)
    assert [len(batch) for batch in batches] == [2] * 7
    order = np.concatenate(batches)
    assert sorted(order[:5]) == sorted(order[5:10]) == list(range(5))
    assert len(set(order[10:])) == 4


def test_epochs_are_shuffled_differently_and_the_same_for_the_same_seed() -> None:
    order = np.concatenate(global_batches(50, 50, steps=2, seed=3))
    assert order[:50].tolist() != order[50:].tolist()
    assert order.tolist() == np.concatenate(global_batches(50, 50, steps=2, seed=3)).tolist()
    assert order.tolist() != np.concatenate(global_batches(50, 50, steps=2, seed=4)).tolist()


def test_part_of_an_epoch_is_its_beginning() -> None:
    whole = np.concatenate(global_batches(10, 1, steps=10, seed=3))
    assert np.concatenate(global_batches(10, 1, steps=3, seed=3)).tolist() == whole[:3].tolist()
    more = np.concatenate(global_batches(10, 1, steps=15, seed=3))
    assert more[:10].tolist() == whole.tolist() and len(more) == 15


def test_batches_by_length_hold_rows_of_similar_length() -> None:
    parts = by_length([3, 9, 1, 7, 5], np.array([10, 11, 12, 13, 14]), 2)
    assert [part.tolist() for part in parts] == [[11, 13], [14, 10], [12]]


def test_a_micro_batch_ends_where_padding_costs_more_than_a_pass() -> None:
    parts = micro_batches([50, 900, 60, 950, 920], np.array([10, 11, 12, 13, 14]), 5)
    assert [part.tolist() for part in parts] == [[13, 14, 11], [12, 10]]
    assert [part.tolist() for part in micro_batches([5, 9, 1], np.arange(3), 5)] == [[1, 0, 2]]


@pytest.mark.parametrize(("size", "ranks"), [(1, 1), (3, 1), (8, 1), (2, 2), (3, 2), (4, 3)])
def test_micro_batches_are_the_cheapest_cut_of_all(size: int, ranks: int, monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    monkeypatch.setattr("denserl_cli.core.data.batches.PASS_TOKENS", {"cpu": 64, "cuda": 64})
    lengths = np.random.default_rng(size).integers(10, 500, size=8)
    ordered = np.sort(lengths)[::-1]

    def cost(cut: tuple[int, ...]) -> float:
        """Of turns that begin after so many rows a process."""
        starts = [0, *np.cumsum(cut)[:-1]]
        return sum(
            64 + ordered[start * ranks] * rows for start, rows in zip(starts, cut, strict=True)
        )

    turns = -(-len(lengths) // ranks)
    cuts = [
        cut
        for count in range(1, turns + 1)
        for cut in product(range(1, size + 1), repeat=count)
        if sum(cut) == turns
    ]
    parts = micro_batches(lengths, np.arange(8), size)
    assert sorted(np.concatenate(parts)) == list(range(8))
    assert max(map(len, parts)) <= size
    found = tuple(len(parts[place]) for place in range(0, len(parts), ranks))
    assert cost(found) == min(map(cost, cuts))


def test_pairs_are_dealt_to_processes_that_get_alike_ones(monkeypatch) -> None:
    lengths = [80, 10, 70, 20, 60, 30, 50]
    parts = pair_batches(lengths, np.arange(7), 2)
    assert [part.tolist() for part in parts] == [[0, 2], [4, 6], [5, 3], [1]]
    monkeypatch.setenv("WORLD_SIZE", "2")
    parts = pair_batches(lengths, np.arange(7), 2)
    assert [part.tolist() for part in parts] == [[0, 4], [2, 6], [5, 1], [3]]


def test_passes_are_as_many_in_every_process(monkeypatch) -> None:
    monkeypatch.setattr("denserl_cli.core.data.batches.PASS_TOKENS", {"cpu": 64, "cuda": 64})
    mine, theirs = np.array([100, 900, 110, 800]), np.array([100, 100, 900, 890])
    assert [part.tolist() for part in forward_passes(mine)] == [[1], [3], [2, 0]]
    assert [part.tolist() for part in forward_passes(theirs)] == [[2, 3], [0, 1]]
    assert [part.tolist() for part in forward_passes(mine, mine, theirs)] == [[1, 3], [2, 0]]
    assert [part.tolist() for part in forward_passes(theirs, mine, theirs)] == [[2, 3], [0, 1]]
    assert [part.tolist() for part in forward_passes(mine, mine, theirs[:2])] == [[1, 3, 2, 0]]


def test_sequences_and_responses_start_in_the_first_column() -> None:
    batch = collate_sequences([ints(1, 2, 3), ints(4)], [ints(5), ints(6, 7)], pad_id=0)
    assert batch.input_ids.tolist() == [[1, 2, 3, 5], [4, 6, 7, 0]]
    assert batch.responses.tolist() == [[5, 0], [6, 7]]
    assert batch.response_mask.tolist() == [[True, False], [True, True]]
    assert batch.response_positions.tolist() == [3, 5, 6]
    kinds = (batch.input_ids.dtype, batch.responses.dtype, batch.response_mask.dtype)
    assert kinds == (torch.int64, torch.int64, torch.bool)


def test_a_window_holds_the_values_of_each_response() -> None:
    batch = collate_sequences([ints(1, 2, 3), ints(4)], [ints(5), ints(6, 7)], pad_id=0)
    assert batch.window(batch.input_ids.flatten()[batch.response_positions]).tolist() == [
        [5, 0],
        [6, 7],
    ]
    values = torch.tensor([1.5, 2.5, 3.5], requires_grad=True)
    batch.window(values)[1].sum().backward()
    assert values.grad is not None and values.grad.tolist() == [0, 1, 1]


def test_sequences_of_pairs_are_numbered_chosen_before_rejected() -> None:
    rows = [row(ints(1, 2), ints(5), ints(6, 7)), row(ints(3), ints(8, 9, 9), ints(4))]
    everything = [[1, 2, 5, 0], [3, 8, 9, 9], [1, 2, 6, 7], [3, 4, 0, 0]]
    batch = collate_sides(rows, range(4), pad_id=0)
    assert batch.input_ids.tolist() == everything
    assert batch.response_mask.sum(1).tolist() == [1, 3, 2, 1]
    some = collate_sides(rows, np.array([2, 1]), pad_id=0)
    assert some.input_ids.tolist() == [everything[2], everything[1]]


def test_a_pair_without_margin_beside_one_with_has_none() -> None:
    rows = [row(ints(1), ints(2), ints(3), 1.5), row(ints(1), ints(2), ints(3))]
    found = margins(rows, torch.device("cpu"))
    assert found is not None and found[0] == 1.5 and found[1].isnan()
    assert margins(rows[1:], torch.device("cpu")) is None


def test_a_batch_is_its_rows_one_by_one() -> None:
    rng = np.random.default_rng(0)
    prompts = [rng.integers(1, 9, size=n).astype(np.int32) for n in (4, 1, 6)]
    responses = [rng.integers(1, 9, size=n).astype(np.int32) for n in (2, 5, 1)]
    batch = collate_sequences(prompts, responses, pad_id=3)
    for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        alone = collate_sequences([prompt], [response], pad_id=3)
        for name in ("input_ids", "responses", "response_mask"):
            own = getattr(alone, name)[0].tolist()
            assert getattr(batch, name)[i].tolist()[: len(own)] == own


def test_widths_are_rounded_on_a_gpu_alone() -> None:
    assert [padded_width(n, "cuda:1") for n in (1, 64, 65)] == [64, 64, 128]
    assert [padded_width(n, torch.device("cuda")) for n in (1, 129)] == [64, 192]
    assert [padded_width(n, device) for n in (1, 65) for device in (None, "cpu")] == [1, 1, 65, 65]
