"""evaluate rm: how often a reward model prefers the better response, and what it goes by."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from denserl_cli.core.data.arrow_rows import PairRows, StepRows, pair_lengths, sequences_of
from denserl_cli.core.data.batches import EncodedPairRow, collate_sides
from denserl_cli.core.data.loading import at_most, encode_sources, load_pairs
from denserl_cli.core.data.packing import pack_sides, side_batches
from denserl_cli.core.data.sequences import every_pair
from denserl_cli.core.data.skipped import count_skipped, list_skipped
from denserl_cli.core.errors import DenserlError, refuse
from denserl_cli.core.evaluation import benchmark_scores, reward_bench
from denserl_cli.core.evaluation.benchmarks import RANKED
from denserl_cli.core.evaluation.sequence_scores import check_scores, score_sequences
from denserl_cli.core.evaluation.steps import evaluate_steps
from denserl_cli.core.models.device import device
from denserl_cli.core.recipe.stages import EVALUATE_RM
from denserl_cli.core.reward_model.metrics import Floats, accuracy, calibration, length_effect
from denserl_cli.core.scoring.loading import load_scorer
from denserl_cli.core.scoring.resolve import prepare
from denserl_cli.core.system.distributed import is_main_process, main_process_first
from denserl_cli.core.system.files import write_text

if TYPE_CHECKING:
    from denserl_cli.core.chat.format import ChatFormat
    from denserl_cli.core.data.skipped import Skipped
    from denserl_cli.core.observer import Observer
    from denserl_cli.core.recipe.schema import Recipe
    from denserl_cli.core.runs.folder import RunFolder
    from denserl_cli.core.scoring.resolve import RewardSetup
    from denserl_cli.core.scoring.scorer import Scorer


def evaluate_reward_model(
    recipe: Recipe,
    run: RunFolder,
    observer: Observer,
    *,
    name: str,
    limit: int | None = None,
    benchmark: str | None = None,
) -> dict[str, Any]:
    """Evaluate a run's reward model, on preference pairs or on a benchmark.

    The pairs are those of `data.evaluation` or, where there is none, what train-rm holds out; a
    benchmark's rows are those of `data.evaluation`.

    Args:
        recipe: as written.
        run: its reward model is evaluated; the result is written into it.
        observer: told of the progress.
        name: of the result's file.
        limit: at most so many rows, drawn with the recipe's seed.
        benchmark: a name of `benchmarks.FORMATS`; every row must be one of it.

    Returns:
        What was written.
    """
    setup = prepare(recipe, run, observer, reward_model=True)
    if benchmark is not None:
        with main_process_first():  # it downloads the rows
            benchmark_scores.check_first_rows(benchmark, recipe.data.evaluation)
    if benchmark in RANKED:
        metrics = _evaluate_ranked(benchmark, setup, run, observer, limit)
    else:
        metrics = _evaluate_pairs(setup, run, observer, limit, benchmark)
    if metrics.get("incomplete"):
        reasons = "; ".join(metrics["incomplete"])
        observer.notice(f"this is not the official score of {benchmark}: {reasons}")
    recipe, record = setup.recipe, setup.record
    assert record is not None
    result = {
        "recipe": recipe.name,
        "reward_model": record.weights or str(run.reward_model),
        **recipe.segmentation.deciding(),
        "aggregate": record.aggregate,
        "data": [source.path for source in recipe.data.evaluation or recipe.data.preferences],
        **({"benchmark": benchmark} if benchmark else {}),
        **metrics,
    }
    file = run.evaluation_file(EVALUATE_RM, name)
    if is_main_process():
        write_text(file, json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    observer.notice(f"written to {file}")
    return result


def _evaluate_pairs(
    setup: RewardSetup, run: RunFolder, observer: Observer, limit: int | None, benchmark: str | None
) -> dict[str, Any]:
    """The metrics of preference pairs or of labelled steps."""
    recipe, chat = setup.recipe, setup.reward_chat_format
    rows, skipped = _evaluation_rows(recipe, chat, observer, limit)
    if isinstance(rows, StepRows):
        if benchmark is not None:
            raise DenserlError(f"{benchmark} has pairs, and the rows are steps with labels")
    elif benchmark is not None:
        unnamed = [f"{row.origin}: no subset" for row in rows if row.subset is None]
        refuse(unnamed, f"every row of {benchmark} names one: mend the file")
    list_skipped(skipped, run.skipped_file(EVALUATE_RM), observer)
    engine, packing = recipe.reward_model.engine, recipe.model.packing
    scorer = load_scorer(setup, run, observer, engine=engine, packing=packing)
    size = 2 * recipe.reward_model.micro_batch_size
    if isinstance(rows, StepRows):
        metrics = evaluate_steps(rows, scorer, size, chat.pad_id, observer)
    else:
        aggregate = recipe.reward_model.aggregate
        scores = score_pairs(rows, scorer, aggregate, size, chat.pad_id, observer)
        metrics = describe(rows if len(rows) == len(scores) else every_pair(rows), scores)
    if benchmark is not None:
        metrics["incomplete"] = _incomplete(metrics, skipped, limit)
    return {
        "held_out": not recipe.data.evaluation,
        "truncated": int(rows.numbers("truncated").sum()),
        "skipped": len(skipped),
        **metrics,
    }


def _incomplete(
    metrics: dict[str, Any], skipped: Sequence[Skipped], limit: int | None
) -> list[str]:
    """What keeps the sections of RewardBench from being the official ones."""
    absent = metrics.get("absent_subsets", ["all"])
    reasons = {
        f"no rows of {', '.join(absent)}": bool(absent),
        f"{len(skipped)} rows cannot be used and are not counted": bool(skipped),
        f"at most {limit} rows were drawn (--limit)": limit is not None,
    }
    return [reason for reason, holds in reasons.items() if holds]


def _evaluate_ranked(
    name: str, setup: RewardSetup, run: RunFolder, observer: Observer, limit: int | None
) -> dict[str, Any]:
    """The metrics of a benchmark that compares several answers to each prompt."""
    recipe, chat = setup.recipe, setup.reward_chat_format
    rows = benchmark_scores.load_rows(name, recipe, chat, limit)
    list_skipped(rows.skipped, run.skipped_file(EVALUATE_RM), observer)
    count_skipped(rows.skipped, observer)
    scorer = load_scorer(setup, run, observer, engine=recipe.reward_model.engine)
    size = 4 * recipe.reward_model.micro_batch_size
    aggregate = recipe.reward_model.aggregate
    scored = benchmark_scores.score_rows(rows.rows, scorer, aggregate, size, chat.pad_id, observer)
    return benchmark_scores.describe(name, rows, scored)


def _evaluation_rows(
    recipe: Recipe, chat: ChatFormat, observer: Observer, limit: int | None
) -> tuple[PairRows | StepRows, list[Skipped]]:
    """The rows to evaluate on, at most `limit` of them drawn with the recipe's seed."""
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

    batch_size: pairs in one forward pass. Of a ranking, every two responses are a pair. Raises
    DenserlError for a score that is not a number.
    """
    sequences = sequences_of(rows)
    collate = pack_sides if scorer.packs else collate_sides
    scores = score_sequences(
        side_batches(sequences, batch_size, packed=scorer.packs),
        lambda part: collate(*sequences.part(rows, part), pad_id, device()),
        scorer,
        aggregate,
        observer,
    )
    pairs = sequences.pairs()
    of_pairs = scores[pairs]
    check_scores(of_pairs, lambda number: rows[int(sequences.owners[pairs[number, 0]])].origin)
    return of_pairs


def describe(rows: Sequence[EncodedPairRow], scores: Floats) -> dict[str, Any]:
    """The metrics of pairs. scores: (pairs, 2), chosen and rejected."""
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
