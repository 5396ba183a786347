"""evaluate rm: how often a reward model prefers the better response, and what it goes by."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from denserl_cli.core.data.arrow_rows import PairRows, pair_lengths, side_lengths
from denserl_cli.core.data.batches import EncodedPairRow, collate_sides, micro_batches
from denserl_cli.core.data.loading import at_most, encode_sources, load_pairs
from denserl_cli.core.data.skipped import count_skipped, list_skipped
from denserl_cli.core.errors import DenserlError
from denserl_cli.core.evaluation import reward_bench
from denserl_cli.core.models.device import device
from denserl_cli.core.recipe.stages import EVALUATE_RM
from denserl_cli.core.reward_model.loss import aggregate_segments
from denserl_cli.core.reward_model.metrics import Floats, accuracy, calibration, length_effect
from denserl_cli.core.scoring.loading import load_scorer
from denserl_cli.core.scoring.resolve import prepare
from denserl_cli.core.scoring.scorer import check_finite
from denserl_cli.core.system.distributed import (
    all_reduce_sum,
    is_main_process,
    shard_micro_batches,
    world_size,
)
from denserl_cli.core.system.files import write_text

if TYPE_CHECKING:
    from denserl_cli.core.chat.format import ChatFormat
    from denserl_cli.core.data.skipped import Skipped
    from denserl_cli.core.observer import Observer
    from denserl_cli.core.recipe.schema import Recipe
    from denserl_cli.core.runs.folder import RunFolder
    from denserl_cli.core.scoring.scorer import Scorer


def evaluate_reward_model(
    recipe: Recipe,
    run: RunFolder,
    observer: Observer,
    *,
    name: str,
    limit: int | None = None,
    subsets: bool = False,
) -> dict[str, Any]:
    """Evaluate a run's reward model on pairs and leave the result in its folder; returns it.

    The pairs are those of `data.evaluation` or, where there is none, what train-rm holds out. name:
    of the result's file. subsets: every row must name the part of the benchmark it belongs to.
    """
    setup = prepare(recipe, run, observer, reward_model=True)
    recipe, record, chat = setup.recipe, setup.record, setup.reward_chat_format
    rows, skipped = _evaluation_pairs(recipe, chat, observer, limit)
    if subsets and any(row.subset is None for row in rows):
        (first, *_) = [row.origin for row in rows if row.subset is None]
        raise DenserlError(
            f"{first}: no column subset, which every row of the benchmark has",
            hint="name a file of the benchmark with --data, or leave --benchmark out",
        )
    list_skipped(skipped, run.skipped_file(EVALUATE_RM), observer)
    scorer = load_scorer(setup, run, observer, engine=recipe.reward_model.engine)
    assert record is not None
    size = 2 * recipe.reward_model.micro_batch_size
    scores = score_pairs(rows, scorer, recipe.reward_model.aggregate, size, chat.pad_id, observer)
    result = {
        "recipe": recipe.name,
        "reward_model": record.weights or str(run.reward_model),
        **recipe.segmentation.deciding(),
        "aggregate": record.aggregate,
        "data": [source.path for source in recipe.data.evaluation or recipe.data.preferences],
        "held_out": not recipe.data.evaluation,
        "truncated": sum(row.truncated for row in rows),
        "skipped": len(skipped),
        **describe(rows, scores),
    }
    file = run.evaluation_file(EVALUATE_RM, name)
    if is_main_process():
        write_text(file, json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    observer.notice(f"written to {file}")
    return result


def _evaluation_pairs(
    recipe: Recipe, chat: ChatFormat, observer: Observer, limit: int | None
) -> tuple[PairRows, list[Skipped]]:
    """The pairs to evaluate on, at most `limit` of them drawn with the recipe's seed."""
    data = recipe.data
    if data.evaluation:
        sources = at_most(limit, data.evaluation)
        rows, skipped, _ = encode_sources(recipe, sources, chat, observer)
        count_skipped(skipped, observer)
    elif data.preferences:
        _, rows, skipped = load_pairs(recipe, chat, observer)
    else:
        rows, skipped = PairRows.of([]), []
    if not rows:
        raise DenserlError(
            f"recipe {recipe.name} holds out no pairs to evaluate on",
            hint="pass --data PATH_OR_HUB_NAME, or set data.evaluation or data.eval_pairs",
        )
    if limit is not None and limit < len(rows):
        drawn = np.random.default_rng(recipe.seed).choice(len(rows), size=limit, replace=False)
        rows = rows.take(np.sort(drawn))
    return rows, skipped


def score_pairs(
    rows: Sequence[EncodedPairRow],
    scorer: Scorer,
    aggregate: Any,
    batch_size: int,
    pad_id: int,
    observer: Observer,
) -> Floats:
    """Sequence scores of both responses of each pair: (pairs, 2), chosen and rejected.

    Raises DenserlError for a score that is not a number, which comes from a broken model.
    """
    lengths = side_lengths(pair_lengths(rows))
    scores = np.zeros(len(lengths))
    observer.begin("score responses", total=len(lengths))
    for part, counts in shard_micro_batches(
        micro_batches(lengths, np.arange(len(lengths)), 2 * batch_size)
    ):
        scored = scorer(collate_sides(rows, part, pad_id, device()))
        assert scored.token_values is not None
        found = aggregate_segments(scored.token_values, scored.ends, aggregate)
        scores[part] = found.double().cpu().numpy() * counts
        observer.advance(len(part) * world_size())
    observer.end()
    scores = all_reduce_sum(torch.from_numpy(scores).to(device())).cpu().numpy()
    of_pairs = scores.reshape(2, -1).T
    for place in np.flatnonzero(~np.isfinite(of_pairs).all(1)):
        check_finite(of_pairs[place].sum(), rows[int(place)].origin)
    return of_pairs


def describe(rows: Sequence[EncodedPairRow], scores: Floats) -> dict[str, Any]:
    """The figures of an evaluation. scores: (pairs, 2), chosen and rejected."""
    differences = scores[:, 0] - scores[:, 1]
    lengths = pair_lengths(rows)
    longer = lengths[:, 1] - lengths[:, 2]
    result = {
        **asdict(accuracy(differences)),
        "calibration": asdict(calibration(differences)),
        "length": asdict(length_effect(differences, longer)),
    }
    subsets = np.array([row.subset or reward_bench.OTHER for row in rows])
    if all(row.subset is None for row in rows):
        return result
    parts = {name: accuracy(differences[subsets == name]) for name in dict.fromkeys(subsets)}
    result["subsets"] = [
        {"subset": str(name), "section": reward_bench.section_of(str(name)), **asdict(part)}
        for name, part in parts.items()
    ]
    by_name = {str(name): part.accuracy for name, part in parts.items()}
    sections = reward_bench.section_scores(by_name)
    if sections:
        mean = sum(sections.values()) / len(sections)
        lacking = reward_bench.absent(by_name)
        result |= {"sections": sections, "section_mean": mean, "absent_subsets": lacking}
    return result
