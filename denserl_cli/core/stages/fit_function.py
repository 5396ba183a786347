"""fit-function: the normaliser of a reward model, from its rewards over a sample of pairs (§4)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from denserl_cli.core.data.arrow_rows import PairRows, StepRows, sequences_of
from denserl_cli.core.data.batches import (
    EncodedPairRow,
    SequenceBatch,
    collate_sides,
    micro_batches,
)
from denserl_cli.core.data.loading import draw_pairs
from denserl_cli.core.data.packing import collate_steps, pack_sides, side_batches
from denserl_cli.core.data.skipped import list_skipped
from denserl_cli.core.engine.random_state import seed_everything
from denserl_cli.core.models.device import device
from denserl_cli.core.normalizer import (
    LocationNormalizer,
    LocationTable,
    fit_constant_normalizer,
    fit_location_normalizer,
    huber_line,
    location_table,
)
from denserl_cli.core.recipe.stages import FIT_FUNCTION
from denserl_cli.core.scoring.loading import load_scorer
from denserl_cli.core.scoring.resolve import prepare
from denserl_cli.core.system.distributed import (
    all_gather_object,
    is_main_process,
    shard_micro_batches,
    world_size,
)

if TYPE_CHECKING:
    from denserl_cli.core.observer import Observer
    from denserl_cli.core.recipe.schema import Recipe
    from denserl_cli.core.runs.folder import Mode, RunFolder
    from denserl_cli.core.scoring.scorer import Scorer


class SegmentRewards(NamedTuple):
    """Arrays over all segments, (segments,) each.

    location: (k+1)/K. reward: the reward model's value. last: whether it is its response's last.
    """

    location: np.ndarray
    reward: np.ndarray
    last: np.ndarray


def fit_normalizer(recipe: Recipe, run: RunFolder, mode: Mode, observer: Observer) -> None:
    """Fit the normaliser of a run's reward model and save it beside the model."""
    setup = prepare(recipe, run, observer, reward_model=True)
    resolved, chat, settings = setup.recipe, setup.reward_chat_format, setup.recipe.normalizer
    rows, skipped = draw_pairs(resolved, chat, settings.pairs, settings.seed, observer)
    seed_everything(resolved.seed)
    engine, packing = resolved.reward_model.engine, resolved.model.packing
    scorer = load_scorer(setup, run, observer, engine=engine, packing=packing)
    run.started(FIT_FUNCTION, mode, observer)
    list_skipped(skipped, run.skipped_file(FIT_FUNCTION), observer)
    rewards = segment_rewards(rows, scorer, settings.batch_size, chat.pad_id, observer)
    if not is_main_process():
        return
    normalizer, record = fit(settings.kind, rewards)
    if settings.min_std is not None:
        normalizer = replace(normalizer, min_std=settings.min_std)
    record |= {
        **resolved.segmentation.deciding(),
        "responses" if isinstance(rows, StepRows) else "pairs": len(rows),
        "seed": settings.seed,
    }
    plot(run.normalizer.with_suffix(".png"), rewards, normalizer)
    normalizer.save(run.normalizer, record)
    run.finished(FIT_FUNCTION, {key: value for key, value in record.items() if key != "table"})
    _show(observer, normalizer, record)


def segment_rewards(
    rows: Sequence[EncodedPairRow] | PairRows | StepRows,
    scorer: Scorer,
    batch_size: int,
    pad_id: int,
    observer: Observer,
) -> SegmentRewards:
    """Location and raw reward of every segment of every response.

    Args:
        rows: Pairs, or responses in steps; they are cut as the scorer says, whatever their steps.
        scorer: Has the reward model.
        batch_size: Pairs, or twice as many responses, that are scored together.
        pad_id: Token that fills batches up.
        observer: Told progress.
    """
    found: list[np.ndarray] = []
    parts, collate = _passes(rows, batch_size, pad_id, packed=scorer.packs)
    observer.begin("score responses", total=sum(map(len, parts)))
    for part, is_mine in shard_micro_batches(parts):
        scored = scorer(collate(part))
        assert scored.token_values is not None
        counts = scored.ends.sum(1, keepdim=True)
        order = scored.ends.cumsum(1)
        columns = (order.double() / counts.clamp(min=1), scored.token_values, order == counts)
        if is_mine:
            found.append(torch.stack([c[scored.ends].double() for c in columns]).cpu().numpy())
        observer.advance(len(part) * world_size())
    observer.end()
    in_order = [part for turn in zip_longest(*all_gather_object(found)) for part in turn]
    location, reward, last = np.concatenate([p for p in in_order if p is not None], axis=1)
    return SegmentRewards(location, reward, last > 0)


def _passes(
    rows: Sequence[EncodedPairRow] | PairRows | StepRows,
    batch_size: int,
    pad_id: int,
    *,
    packed: bool,
) -> tuple[list[np.ndarray], Callable[[np.ndarray], SequenceBatch]]:
    """The numbers of the responses in each forward pass, and what makes a batch of them."""
    if isinstance(rows, StepRows):
        steps: StepRows = rows
        parts = micro_batches(steps.lengths(), np.arange(len(steps)), 2 * batch_size)
        return parts, lambda part: collate_steps(
            [steps[int(i)] for i in part], pad_id, device(), packed=packed
        )
    pairs: Sequence[EncodedPairRow] = rows
    together = pack_sides if packed else collate_sides
    sequences = sequences_of(pairs)
    parts = side_batches(sequences, batch_size, packed=packed)
    return parts, lambda part: together(*sequences.part(pairs, part), pad_id, device())


def fit(kind: str, rewards: SegmentRewards) -> tuple[LocationNormalizer, dict[str, Any]]:
    """Fit a normaliser of a kind (`normalizer.kind`); returns it and the record of the fit."""
    table = location_table(rewards.location, rewards.reward)
    record: dict[str, Any] = {
        "kind": kind,
        "segments": len(rewards.reward),
        "table": [dict(zip(LocationTable._fields, row, strict=True)) for row in _rows(table)],
    }
    if kind == "location":
        log_p = np.log(table.location)
        record["r2_mean"] = huber_line(log_p, table.mean).r2
        record["r2_std"] = huber_line(log_p, table.std).r2
        return fit_location_normalizer(rewards.location, rewards.reward), record
    if kind == "none":
        return LocationNormalizer(0.0, 0.0, 0.0, 1.0), record
    chosen = rewards.reward[rewards.last] if kind == "last" else rewards.reward
    return fit_constant_normalizer(chosen), record


def plot(path: Path, rewards: SegmentRewards, normalizer: LocationNormalizer) -> None:
    """Plot mean and std of the rewards by location, measured and fitted, to a PNG file."""
    from matplotlib.figure import Figure

    table = location_table(rewards.location, rewards.reward)
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    line = np.geomspace(table.location.min(), 1, 200)
    for axes, name in zip(figure.subplots(1, 2), ("mean", "std"), strict=True):
        axes.scatter(table.location, getattr(table, name), s=8, alpha=0.5, label="measured")
        axes.plot(line, getattr(normalizer, name)(line), color="C1", label="normaliser")
        axes.set(xlabel="location p", ylabel=f"{name} of segment rewards", xscale="log")
        axes.legend()
    aside = path.with_name(f".{path.name}.tmp")
    figure.savefig(aside, format="png", dpi=120)
    aside.replace(path)


def _rows(table: LocationTable) -> list[tuple[float, ...]]:
    return [tuple(float(value) for value in row) for row in zip(*table, strict=True)]


def _show(observer: Observer, normalizer: LocationNormalizer, record: dict[str, Any]) -> None:
    names = ("w_mean", "w_std", "b_mean", "b_std", "min_std")
    rows = [[name, f"{getattr(normalizer, name):.4f}"] for name in names]
    facts = ("kind", "r2_mean", "r2_std", "pairs", "responses", "segments")
    rows += [[name, record[name]] for name in facts if name in record]
    observer.table("normaliser", ["metric", "value"], rows)
