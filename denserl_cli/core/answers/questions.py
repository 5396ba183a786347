"""A benchmark's own question file, read and checked as a whole."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from denserl_cli.core.answers.formats import BENCHMARKS, Benchmark, Identity, Question
from denserl_cli.core.data.local_files import Row
from denserl_cli.core.data.skipped import Skipped
from denserl_cli.core.data.sources import read_source
from denserl_cli.core.errors import DenserlError, refuse
from denserl_cli.core.recipe.schema import Source


def read_questions(path: Path, benchmark: Benchmark) -> list[Question]:
    """The questions of a JSONL file or a JSON list, in its order.

    Raises DenserlError, with all problems at once, unless every row is a question of this benchmark
    and no question comes twice.
    """
    if not path.is_file():
        raise DenserlError(
            f"--questions {path}: no such file",
            hint=f"name the question file of {benchmark.name}, JSONL or a JSON list",
        )
    problems: list[str] = []
    questions: dict[Identity, Question] = {}
    for number, row in enumerate(rows_of(path)):
        if isinstance(row, Skipped):
            problems.append(f"{row.origin}: {row.reason}: {row.detail}")
            continue
        if number == 0:
            _refuse_another(path, row.fields, benchmark)
        found = [f"{row.origin}: {problem}" for problem in _problems(row.fields, benchmark)]
        problems += found
        if found:
            continue
        question = _question(row, benchmark)
        earlier = questions.setdefault(question.id, question)
        if earlier is not question:
            problems.append(f"{row.origin}: the same {benchmark.id_field} as {earlier.origin}")
    refuse(problems, f"mend the question file of {benchmark.name}")
    if not questions:
        raise DenserlError(f"{path}: no questions", hint="the file is empty")
    return list(questions.values())


def rows_of(path: Path) -> Iterator[Row | Skipped]:
    """The rows of a local file in their order."""
    return read_source(Source(str(path)), np.random.default_rng(0))


def _question(row: Row, benchmark: Benchmark) -> Question:
    text = row.fields[benchmark.text_field]
    turns = (text,) if benchmark.turns == 1 else tuple(text)
    return Question(row.fields[benchmark.id_field], turns, row.fields, row.origin)


def _refuse_another(path: Path, fields: Mapping[str, Any], benchmark: Benchmark) -> None:
    """Raise DenserlError when a row is another benchmark's question, or nothing like one."""
    if benchmark.fits(fields):
        return
    other = next((one for one in BENCHMARKS.values() if one.fits(fields)), None)
    if other is not None:
        raise DenserlError(
            f"{path}: this looks like {other.name}'s question file, not {benchmark.name}'s",
            hint=f"pass --benchmark {other.name}, or the questions of {benchmark.name}",
        )
    if not any(name in fields for name in benchmark.fields):
        raise DenserlError(
            f"{path}: not a question file of {benchmark.name}\n"
            f"columns found: {', '.join(map(str, fields)) or 'none'}\n"
            f"columns wanted: {', '.join(benchmark.fields)}",
            hint=f"name the question file of {benchmark.name}",
        )


def _problems(fields: Mapping[str, Any], benchmark: Benchmark) -> Iterator[str]:
    """Everything that keeps a row from being a question."""
    for name in benchmark.fields:
        value = fields.get(name)
        if value is None:
            yield f"no {name}"
        elif name == benchmark.text_field:
            yield from _text_problems(name, value, benchmark.turns)
        elif name == benchmark.id_field and isinstance(value, int) and not isinstance(value, bool):
            continue
        else:
            yield from _text_problems(name, value, 1)
    category = fields.get("category")
    if benchmark.categories and isinstance(category, str) and category.strip():
        if category not in benchmark.categories:
            known = ", ".join(benchmark.categories)
            yield f"category is {category[:60]!r}, not one of {known}"


def _text_problems(name: str, value: object, turns: int) -> Iterator[str]:
    texts = [value] if turns == 1 else value
    if not isinstance(texts, list) or len(texts) != turns:
        yield f"{name} is no list of {turns} texts"
        return
    for text in texts:
        if not isinstance(text, str):
            yield f"{name} is {type(text).__name__}, not text"
        elif not text.strip():
            yield f"{name} is empty"
        elif not _writable(text):
            yield f"{name} is not Unicode text"


def _writable(text: str) -> bool:
    """Whether a text has no half of a surrogate pair, which JSON can hold and UTF-8 cannot."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)
