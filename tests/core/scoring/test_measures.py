from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from denserl_cli.core.data.batches import collate_sequences
from denserl_cli.core.models.sequence_classifier import SequenceReader
from denserl_cli.core.scoring.measures import Scoring, ShapleyMeasure


class OtherTokenizer(SequenceReader):
    """Its ids are the policy's plus 100; a conversation is worth the sum of its ids."""

    def __init__(self) -> None:
        super().__init__(plain_head=False, rewrite=lambda p, r: np.concatenate([p, r]) + 100)

    def read(self, model: Any, rows: Any) -> torch.Tensor:
        return torch.tensor([float(row.sum()) for row in rows])


class Anything:
    device = torch.device("cpu")

    def __call__(self, function: Any, *inputs: Any) -> Any:
        return function(None, *inputs)


@pytest.mark.parametrize("segments", [3, 8])
def test_shapley_values_of_a_model_with_another_tokenizer(segments: int):
    """The game is additive in the other ids, so each segment gets exactly its own worth."""
    ids = np.arange(2 * segments + 1)  # the last token belongs to no segment
    batch = collate_sequences([np.array([50])], [ids], 0)
    ends = torch.zeros(1, len(ids), dtype=torch.bool)
    ends[0, 1:-1:2] = True
    measure = ShapleyMeasure(
        *("m", Anything(), OtherTokenizer(), Scoring(None)),
        **{"orders": 2, "seed": 0, "batch_size": 4, "pad_id": 0},
    )
    found = measure(batch, ends, 1.0)
    worth = torch.from_numpy(ids[:-1].reshape(segments, 2).sum(1) + 200).float()
    torch.testing.assert_close(found["shapley_values"][ends], worth)
    assert found["empty_score"].item() == 150 + ids[-1] + 100
    torch.testing.assert_close(found["score"], found["empty_score"] + worth.sum())
