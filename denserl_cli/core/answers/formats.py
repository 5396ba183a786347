"""The benchmarks for policies: what their question files hold and what their judges read.

Key names, their order and their nesting are the benchmarks' own.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

Identity = int | str
"""What tells a benchmark's questions apart; AlpacaEval has nothing but the instruction."""


@dataclass(frozen=True)
class Question:
    """One question: the user's turns, the fields of its row and where that row is."""

    id: Identity
    turns: tuple[str, ...]
    fields: Mapping[str, Any]
    origin: str


class Answer(NamedTuple):
    """The assistant's turns, how many tokens they have together, when they were written."""

    turns: tuple[str, ...]
    tokens: int
    tstamp: float


MakeRow = Callable[[Question, Answer, str], dict[str, Any]]


@dataclass(frozen=True)
class Benchmark:
    """How a benchmark asks, how its published answers are generated, what its judge reads."""

    name: str
    id_field: str
    text_field: str
    further_fields: tuple[str, ...]
    turns: int
    max_new_tokens: int
    suffix: str
    """Of the answers file: .json is a list, .jsonl one object a line."""
    row: MakeRow
    """(question, answer, generator) to a row of the answers file."""
    temperatures: Mapping[str, float]
    """Sampling temperature by category; 0 (greedy) for the others."""
    categories: tuple[str, ...] = ()
    """What the column `category` may hold, where it is there; empty: anything."""

    @property
    def fields(self) -> tuple[str, ...]:
        """Fields that every question must have."""
        return tuple(dict.fromkeys((self.id_field, self.text_field, *self.further_fields)))

    def fits(self, fields: Mapping[str, Any]) -> bool:
        """Whether a row has the columns of this benchmark, and no category of another one."""
        there = all(name in fields for name in self.fields)
        return there and (
            not self.categories or fields.get("category", self.categories[0]) in self.categories
        )

    def temperature(self, question: Question) -> float:
        """The sampling temperature of a question."""
        return self.temperatures.get(question.fields.get("category", ""), 0.0)

    def write(
        self, questions: Sequence[Question], answers: Mapping[Identity, Answer], generator: str
    ) -> str:
        """The text of the answers file, in the order of the questions."""
        rows = [self.row(question, answers[question.id], generator) for question in questions]
        if self.suffix == ".json":
            return json.dumps(rows, indent=1) + "\n"
        return "".join(json.dumps(row) + "\n" for row in rows)


def _alpaca_eval(question: Question, answer: Answer, generator: str) -> dict[str, Any]:
    return {
        "instruction": question.turns[0],
        "output": answer.turns[0],
        "generator": generator,
        "dataset": question.fields["dataset"],
        "datasplit": question.fields.get("datasplit", "eval"),
    }


def _arena_hard(question: Question, answer: Answer, generator: str) -> dict[str, Any]:
    return {
        "uid": question.id,
        "ans_id": _answer_id(question, answer, generator),
        "model": generator,
        "messages": [
            {"content": question.turns[0], "role": "user"},
            {"content": {"answer": answer.turns[0]}, "role": "assistant"},
        ],
        "tstamp": answer.tstamp,
        "metadata": {"token_len": answer.tokens, **_markdown(answer.turns[0])},
    }


def _mt_bench(question: Question, answer: Answer, generator: str) -> dict[str, Any]:
    return {
        "question_id": question.id,
        "answer_id": _answer_id(question, answer, generator),
        "model_id": generator,
        "choices": [{"index": 0, "turns": list(answer.turns)}],
        "tstamp": answer.tstamp,
    }


def _answer_id(question: Question, answer: Answer, generator: str) -> str:
    """22 letters and digits like the judges' own ids, the same for the same answer."""
    letters = "23456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
    text = json.dumps([generator, question.id, answer.turns])
    number = int.from_bytes(hashlib.sha256(text.encode()).digest())
    return "".join(letters[number // len(letters) ** place % len(letters)] for place in range(22))


def _markdown(answer: str) -> dict[str, dict[str, int]]:
    """The counts that Arena-Hard's style control reads; fenced code does not count."""
    text = re.sub(r"```[^`]*```", "", answer)

    def count(pattern: str) -> int:
        return len(re.findall(pattern, text, re.MULTILINE))

    return {
        "header_count": {f"h{level}": count(rf"^#{{{level}}}\s") for level in range(1, 7)},
        "list_count": {"ordered": count(r"^\s*\d+\.\s"), "unordered": count(r"^\s*[-*+]\s")},
        "bold_count": {"**": count(r"\*\*[^*\n]+\*\*"), "__": count(r"__[^_\n]+__")},
    }


BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark(
            name="alpaca-eval",
            id_field="instruction",
            text_field="instruction",
            further_fields=("dataset",),
            turns=1,
            max_new_tokens=2048,
            suffix=".json",
            row=_alpaca_eval,
            temperatures={},
        ),
        Benchmark(
            name="arena-hard",
            id_field="uid",
            text_field="prompt",
            further_fields=(),
            turns=1,
            max_new_tokens=4096,
            suffix=".jsonl",
            row=_arena_hard,
            temperatures={},
            categories=("arena-hard-v0.1",),
        ),
        Benchmark(
            name="arena-hard-v2",
            id_field="uid",
            text_field="prompt",
            further_fields=("category", "subcategory"),
            turns=1,
            max_new_tokens=8192,
            suffix=".jsonl",
            row=_arena_hard,
            temperatures={},
            categories=("hard_prompt", "creative_writing"),
        ),
        Benchmark(
            name="mt-bench",
            id_field="question_id",
            text_field="turns",
            further_fields=("category",),
            turns=2,
            max_new_tokens=1024,
            suffix=".jsonl",
            row=_mt_bench,
            temperatures={"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1},
        ),
    )
}
