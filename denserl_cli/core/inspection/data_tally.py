"""The rows of a source as they pass: columns, lengths, duplicates, one example."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from xxhash import xxh3_64_intdigest

from denserl_cli.core.data.conversations import (
    Pair,
    Prompt,
    ReadStats,
    as_prompts,
    parsed,
)
from denserl_cli.core.data.encoding import PairEncoding, PromptEncoding, StepEncoding
from denserl_cli.core.data.kinds import parser_of
from denserl_cli.core.data.local_files import Row
from denserl_cli.core.data.row_readers import fitting_mapping, read_mapped
from denserl_cli.core.data.skipped import Skipped
from denserl_cli.core.data.sources import open_source
from denserl_cli.core.data.steps import Steps
from denserl_cli.core.recipe.data_formats import RowMapping, row_mappings

if TYPE_CHECKING:
    from denserl_cli.core.chat.format import ChatFormat
    from denserl_cli.core.data.messages import Turns
    from denserl_cli.core.recipe.schema import Source

_SHOWN_IDS = 12
Kind = Literal["prompts", "pairs", "steps"]
"""What a source holds."""


class Limits(NamedTuple):
    """Limits to the number of ids, as a recipe has them."""

    max_length: int
    max_prompt_length: int
    prompts: int
    """Of a prompt that train-ppo answers."""


@dataclass
class Column:
    """A column: in how many rows it holds something, and of which types."""

    filled: int = 0
    types: dict[str, int] = field(default_factory=dict)


class Lengths(NamedTuple):
    """A summary of lengths."""

    median: float
    ninety_percent: float
    longest: int


@dataclass
class Example:
    """A rendered row. Ids at the place where the answer begins; none without a tokenizer."""

    origin: str
    prompt: str
    answers: dict[str, str]
    prompt_tokens: int | None = None
    last_prompt_ids: list[int] = field(default_factory=list)
    first_answer_ids: dict[str, list[int]] = field(default_factory=dict)


class Reading:
    """The rows of a source as they pass, or the first ones: columns are counted on the way."""

    def __init__(self, source: Source, prompts_only: bool, first: int | None = None) -> None:
        self.source, self.prompts_only, self._first = source, prompts_only, first
        self.stats, self.columns, self.rows = ReadStats(), dict[str, Column](), 0
        self.mapping: RowMapping | None = None

    def items(self) -> Iterator[Pair | Prompt | Steps]:
        """The pairs, labelled steps or prompts of the rows."""
        rng = np.random.default_rng(0)
        rows, reader = read_mapped(self.source, open_source(self.source), rng, self._watched)
        if self.prompts_only:
            yield from parsed(rows, reader, as_prompts, self.stats)
        else:
            yield from parsed(rows, reader, parser_of(self.source), self.stats)

    def _watched(self, rows: Iterator[Row | Skipped]) -> Iterator[Row | Skipped]:
        for row in islice(rows, self._first):
            self.rows += 1
            if isinstance(row, Row):
                if self.mapping is None:
                    self.mapping = fitting_mapping(row_mappings(self.source), row.fields)
                for name, value in row.fields.items():
                    column = self.columns.setdefault(name, Column())
                    if value is not None:
                        column.filled += 1
                        kind = type_of(value)
                        column.types[kind] = column.types.get(kind, 0) + 1
            yield row


class RowTally:
    """Counts of what passes, encoded where there is a tokenizer."""

    def __init__(
        self,
        chat: ChatFormat | None,
        limits: Limits | None,
        kind: Kind,
    ) -> None:
        self.chat = chat
        self.encoding: PairEncoding | StepEncoding | PromptEncoding | None = None
        if chat is not None and limits is not None:
            answered = (limits.max_length, limits.max_prompt_length)
            if kind == "prompts":
                self.encoding = PromptEncoding(chat, limits.prompts)
            elif kind == "steps":
                self.encoding = StepEncoding(chat, *answered)
            else:
                self.encoding = PairEncoding(chat, *answered)
        names = {"prompts": (), "steps": ("response",), "pairs": ("chosen", "rejected")}[kind]
        self.lengths: dict[str, list[int]] = {name: [] for name in ("prompt", *names)}
        self.failed: list[Skipped] = []
        self.usable = self.cut = self.duplicates = 0
        self.prompt_keys, self._seen = set[int](), set[int]()
        self.example: Example | None = None

    def add(self, items: Sequence[Pair | Prompt | Steps]) -> None:
        """Count some pairs, labelled steps or prompts."""
        encoded: Sequence[Any] = [None] * len(items)
        if self.encoding is not None:
            encoded = list(self.encoding.encode(items))  # type: ignore[arg-type]
        for item, row in zip(items, encoded, strict=True):
            if isinstance(row, Skipped):
                self.failed.append(row)
                continue
            self.usable += 1
            self.cut += row is not None and row.truncated
            texts = texts_of(item)
            for name, values in self.lengths.items():
                values.append(len(texts[name]) if row is None else len(_side_ids(row, name)))
            self.prompt_keys.add(item_key(prompt_of(item)))
            others = [turns[-1] for turns in item.others] if isinstance(item, Pair) else []
            key = item_key([*({"content": text} for text in texts.values()), *others])
            self.duplicates += key in self._seen
            self._seen.add(key)
            if self.example is None:
                self.example = self._example(item, texts, row)

    def longer_share(self) -> float | None:
        """Share of the pairs of unequal length whose better answer is the longer one."""
        if not self.lengths.get("chosen"):
            return None
        longer = np.subtract(self.lengths["chosen"], self.lengths["rejected"])
        longer = longer[longer != 0]
        return float((longer > 0).mean()) if len(longer) else None

    def _example(self, item: Pair | Prompt | Steps, texts: dict[str, str], row: Any) -> Example:
        answers = {name: text for name, text in texts.items() if name != "prompt"}
        if row is None or self.chat is None:
            return Example(item.origin, texts["prompt"], answers)
        tokenizer = self.chat.template.tokenizer
        ids = {name: [int(one) for one in _side_ids(row, name)] for name in self.lengths}
        shown = {name: str(tokenizer.decode(values)) for name, values in ids.items()}
        return Example(
            item.origin,
            shown.pop("prompt"),
            shown,
            len(ids["prompt"]),
            ids.pop("prompt")[-_SHOWN_IDS:],
            {name: values[:_SHOWN_IDS] for name, values in ids.items()},
        )


def type_of(value: object) -> str:
    """The type of a value, as a column's is described."""
    if isinstance(value, str):
        return "text"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int | float):
        return "number"
    if isinstance(value, Mapping):
        return f"{{{', '.join(map(str, list(value)[:6]))}}}"
    if isinstance(value, list):
        kinds = dict.fromkeys(type_of(item) for item in value[:10])
        return f"list of {' or '.join(kinds)}" if kinds else "empty list"
    return type(value).__name__


def prompt_of(item: Pair | Prompt | Steps) -> Turns:
    """The prompt's turns."""
    if isinstance(item, Steps):
        return item.messages[:-1]
    return item.chosen[:-1] if isinstance(item, Pair) else item.messages


def texts_of(item: Pair | Prompt | Steps) -> dict[str, str]:
    """The texts of an item: of its prompt, with roles, and of its answers."""
    prompt = "\n".join(f"[{turn['role']}] {turn['content']}" for turn in prompt_of(item))
    if isinstance(item, Prompt):
        return {"prompt": prompt}
    if isinstance(item, Steps):
        return {"prompt": prompt, "response": item.messages[-1]["content"]}
    chosen, rejected = item.chosen[-1]["content"], item.rejected[-1]["content"]
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _side_ids(row: Any, name: str) -> Any:
    return row.ids if isinstance(row, Prompt) else getattr(row, name)


def item_key(turns: Sequence[Mapping[str, str]]) -> int:
    """What tells turns apart: 64 bits of their roles and contents."""
    return xxh3_64_intdigest(repr([sorted(turn.items()) for turn in turns]).encode())


def summary(values: Sequence[int]) -> Lengths:
    """Median, 90 % quantile and maximum."""
    return Lengths(float(np.median(values)), float(np.quantile(values, 0.9)), int(np.max(values)))
