"""Scores of many responses, in batches of similar length, shared between the processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from denserl_cli.core.models.device import device
from denserl_cli.core.scoring.scorer import check_finite
from denserl_cli.core.segmentation import aggregate_segments
from denserl_cli.core.system.distributed import all_reduce_sum, shard_micro_batches, world_size

if TYPE_CHECKING:
    from denserl_cli.core.data.batches import SequenceBatch
    from denserl_cli.core.observer import Observer
    from denserl_cli.core.reward_model.metrics import Floats
    from denserl_cli.core.scoring.scorer import Scorer


def score_sequences(
    parts: Sequence[np.ndarray],
    collate: Callable[[np.ndarray], SequenceBatch],
    scorer: Scorer,
    aggregate: Any,
    observer: Observer,
) -> Floats:
    """Sequence scores of responses that end with a terminator.

    Args:
        parts: the numbers of the responses in each forward pass, N in all.
        collate: makes the batch of some of them, from their numbers.
        scorer: the reward model, with the reference where segments depend on it.
        aggregate: how segment rewards become a score (`aggregate_segments`).
        observer: told of the progress.

    Returns:
        (N,) float64, the same in every process.
    """
    scores = np.zeros(sum(map(len, parts)))
    observer.begin("score responses", total=len(scores))
    for part, counts in shard_micro_batches(parts):
        scored = scorer(collate(part))
        assert scored.token_values is not None
        found = aggregate_segments(scored.token_values, scored.ends, aggregate)
        scores[part] = found.double().cpu().numpy() * counts
        observer.advance(len(part) * world_size())
    observer.end()
    return all_reduce_sum(torch.from_numpy(scores).to(device())).cpu().numpy()


def check_scores(scores: Floats, origin: Callable[[int], str]) -> None:
    """Raise DenserlError for a score that is not a number, which comes from a broken model.

    scores: (N,) or (N, sides). origin: where row n of them came from.
    """
    for number in np.flatnonzero(~np.isfinite(scores).reshape(len(scores), -1).all(1)):
        check_finite(float(np.sum(scores[number])), origin(int(number)))
