"""Benchmarks that compare several answers to each prompt, all of them scored as one batch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from denserl_cli.core.chat.layouts import follow
from denserl_cli.core.chat.pairs import EncodedPair, check_limits, truncate_pair
from denserl_cli.core.data.batches import collate_sequences, micro_batches
from denserl_cli.core.data.skipped import Skipped, check_usable
from denserl_cli.core.data.sources import Row, read_source
from denserl_cli.core.errors import DenserlError
from denserl_cli.core.evaluation.benchmark_rows import (
    BenchmarkRow,
    ScoredRow,
    check_format,
    read_rows,
)
from denserl_cli.core.evaluation.benchmarks import FORMATS, RANKED
from denserl_cli.core.evaluation.sequence_scores import check_scores, score_sequences
from denserl_cli.core.models.device import device

if TYPE_CHECKING:
    from denserl_cli.core.chat.format import ChatFormat
    from denserl_cli.core.data.batches import SequenceBatch
    from denserl_cli.core.observer import Observer
    from denserl_cli.core.recipe.schema import DataConfig, Recipe, Source
    from denserl_cli.core.scoring.scorer import Scorer


class EncodedRow(NamedTuple):
    """A row as int32 ids: a prompt and an answer, which ends with the terminator, for each answer.

    truncated: answers that were cut, or whose prompt was.
    """

    row: BenchmarkRow
    sequences: list[tuple[np.ndarray, np.ndarray]]
    truncated: int


class EncodedRows(NamedTuple):
    """Rows that can be scored, those that cannot, and how many were not drawn."""

    rows: list[EncodedRow]
    skipped: list[Skipped]
    left_out: int = 0


def check_first_rows(name: str, sources: Sequence[Source]) -> None:
    """Raise DenserlError when sources are not those of a benchmark, by their first rows."""
    for source in sources:
        first = next(read_source(source, np.random.default_rng(0)), None)
        if isinstance(first, Row):
            check_format(first, FORMATS[name], FORMATS.values())


def load_rows(name: str, recipe: Recipe, chat: ChatFormat, limit: int | None) -> EncodedRows:
    """Read and encode the rows of a benchmark from `data.evaluation`.

    limit: at most so many of them, drawn with the recipe's seed. Raises DenserlError for rows that
    are not the benchmark's, and when no row can be encoded or, with `data.strict`, one cannot.
    """
    rows: list[BenchmarkRow] = []
    for source in recipe.data.evaluation:
        if source.weight != 1 or source.max_samples is not None:
            raise DenserlError(
                f"{source.path}: each row of {name} counts once, so no weight and no max_samples",
                hint="leave them out; --limit draws rows",
            )
        found = read_source(source, np.random.default_rng(recipe.seed))
        rows += read_rows(found, FORMATS[name], FORMATS.values())
    if not rows:
        paths = ", ".join(source.path for source in recipe.data.evaluation)
        raise DenserlError(f"no rows in {paths}", hint=f"name a file of {name} with --data")
    count = len(rows)
    if limit is not None and limit < count:
        drawn = np.random.default_rng(recipe.seed).choice(count, size=limit, replace=False)
        rows = [rows[number] for number in np.sort(drawn)]
    encoded = _encode(rows, chat, recipe.data)
    check_usable(len(encoded.rows), encoded.skipped, strict=recipe.data.strict)
    return encoded._replace(left_out=count - len(rows))


def _encode(rows: Sequence[BenchmarkRow], chat: ChatFormat, data: DataConfig) -> EncodedRows:
    """Ids of every row, cut like preference pairs; rows that the template cannot write."""
    check_limits(data.max_length, data.max_prompt_length)
    usable, layouts, skipped = [], [], []
    for row in rows:
        try:
            asked = {"role": "user", "content": row.prompt}
            answered = [[asked, {"role": "assistant", "content": one}] for one in row.answers]
            layouts.append([chat.answer_layouts(turns) for turns in answered])
        except DenserlError as error:
            skipped.append(Skipped(row.origin, error.message, error.hint or ""))
        else:
            usable.append(row)
    flat = chain.from_iterable(chain.from_iterable(layouts))  # prompt, answer, prompt, answer, ...
    ids = iter(chat.tokenize(list(flat)))
    found = []
    for row, parts in zip(usable, layouts, strict=True):
        whole = [follow(next(ids), next(ids)) for _ in parts]
        found.append(_cut(row, whole, data, chat.terminator_id))
    return EncodedRows(found, skipped)


def _cut(
    row: BenchmarkRow,
    whole: Sequence[tuple[list[int], list[int]]],
    data: DataConfig,
    terminator_id: int,
) -> EncodedRow:
    """Cut the prompt for the longest of the answers, so that all of them follow the same one."""
    longest = max((answer for _, answer in whole), key=len)
    limits = data.max_length, data.max_prompt_length, terminator_id
    cut = [
        truncate_pair(EncodedPair(prompt, answer, longest), *limits)[:2] for prompt, answer in whole
    ]
    truncated = sum(kept != given for kept, given in zip(cut, whole, strict=True))
    sequences = [(np.array(kept[0], np.int32), np.array(kept[1], np.int32)) for kept in cut]
    return EncodedRow(row, sequences, truncated)


def score_rows(
    rows: Sequence[EncodedRow],
    scorer: Scorer,
    aggregate: Any,
    batch_size: int,
    pad_id: int,
    observer: Observer,
) -> list[ScoredRow]:
    """The scores of every answer of every row; batch_size: answers in one forward pass.

    What is the same after the cut is scored once: it has one score, whatever batches round to.
    """
    every = [sequence for one in rows for sequence in one.sequences]
    numbers: dict[bytes, int] = {}
    places = [numbers.setdefault(_identity(sequence), len(numbers)) for sequence in every]
    _, first = np.unique(places, return_index=True)
    sequences = [every[place] for place in first]

    def collate(part: np.ndarray) -> SequenceBatch:
        prompts, answers = zip(*(sequences[number] for number in part), strict=True)
        return collate_sequences(prompts, answers, pad_id, device())

    lengths = np.array([len(prompt) + len(answer) for prompt, answer in sequences])
    parts = micro_batches(lengths, np.arange(len(lengths)), batch_size)
    found = score_sequences(parts, collate, scorer, aggregate, observer)
    scores = found[places]
    origins = [one.row.origin for one in rows for _ in one.sequences]
    check_scores(scores, origins.__getitem__)
    ends = np.cumsum([len(one.sequences) for one in rows])
    scored = []
    for one, of_row in zip(rows, np.split(scores, ends[:-1]), strict=True):
        correct, wrong = np.split(of_row, [len(one.row.correct)])
        scored.append(ScoredRow(one.row.part, one.row.id, correct, wrong))
    return scored


def _identity(sequence: tuple[np.ndarray, np.ndarray]) -> bytes:
    prompt, answer = sequence
    return b"%d:" % len(prompt) + prompt.tobytes() + answer.tobytes()


def describe(name: str, encoded: EncodedRows, scored: Sequence[ScoredRow]) -> dict[str, Any]:
    """The official metrics, and in `incomplete` all that keeps them from being official."""
    found = RANKED[name].metrics(scored)
    incomplete = found.pop("incomplete")
    if encoded.skipped:
        incomplete.append(f"{len(encoded.skipped)} rows cannot be encoded and are not counted")
    if encoded.left_out:
        incomplete.append(f"{encoded.left_out} rows were not drawn (--limit)")
    return {
        "rows": len(encoded.rows),
        "answers": sum(len(one.sequences) for one in encoded.rows),
        "truncated": sum(one.truncated for one in encoded.rows),
        "skipped": len(encoded.skipped),
        **found,
        "incomplete": incomplete,
    }
