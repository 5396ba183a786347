"""Conversations become encoded rows: a few at a time, whether they are kept in memory or a file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from denserl_cli.core.chat.format import ChatFormat, Layout
from denserl_cli.core.chat.layouts import Placed, place_answers
from denserl_cli.core.chat.pairs import Encoded, check_limits, join, truncate
from denserl_cli.core.data.arrow_rows import PairRows, PromptRows, StepRows, digest
from denserl_cli.core.data.batches import (
    EncodedPairRow,
)
from denserl_cli.core.data.conversations import (
    Item,
    Pair,
    Prompt,
    ReadStats,
    as_pairs,
    as_prompts,
    as_steps,
    parsed,
)
from denserl_cli.core.data.local_files import Row
from denserl_cli.core.data.row_formats import RowReader
from denserl_cli.core.data.skipped import Skipped, check_usable
from denserl_cli.core.data.steps import EncodedStepRow, Steps, step_places
from denserl_cli.core.errors import DenserlError
from denserl_cli.core.observer import CHUNK, Observer, with_progress
from denserl_cli.core.text_cuts import cut_tokens


class EncodedPairs(NamedTuple):
    """Encoded pairs, those that the chat template cannot write, and how many were cut."""

    rows: Sequence[EncodedPairRow]
    skipped: list[Skipped]
    truncated: int


class EncodedPrompts(NamedTuple):
    """Encoded prompts, those that the chat template cannot write, and how many were cut."""

    prompts: Sequence[Prompt]
    skipped: list[Skipped]
    truncated: int


@dataclass(frozen=True)
class PairEncoding:
    """How rows of a source become encoded preference pairs, cut as method §3 has it."""

    chat: ChatFormat
    max_length: int
    max_prompt_length: int
    stored = PairRows

    @property
    def limits(self) -> dict[str, int]:
        """Limits to the number of ids."""
        return {"max_length": self.max_length, "max_prompt_length": self.max_prompt_length}

    def parse(
        self, rows: Iterable[Row | Skipped], reader: RowReader, stats: ReadStats
    ) -> Iterator[Pair]:
        """The preference pairs of the usable rows."""
        return parsed(rows, reader, as_pairs, stats)

    def encode(self, pairs: Iterable[Pair]) -> Iterator[EncodedPairRow | Skipped]:
        """Each pair encoded, or why it cannot be.

        Raises DenserlError when the limits leave no room for a response.
        """
        check_limits(self.max_length, self.max_prompt_length)
        chat = self.chat

        def layouts(pair: Pair) -> list[Layout]:
            return chat.pair_layouts(pair.chosen, pair.rejected, *pair.others)

        for pair, ids in _encoded(chat, pairs, layouts):
            yield ids if isinstance(ids, Skipped) else self._cut(pair, *ids)

    def _cut(
        self, pair: Pair, prompt_alone: Encoded, *responses: Encoded
    ) -> EncodedPairRow | Skipped:
        whole = join(prompt_alone, *responses)
        cut = truncate(whole, self.max_length, self.max_prompt_length, self.chat.terminator_id)
        if len({*map(tuple, cut[1:])}) < len(responses):
            detail = "after the template's trimming and the cut to max_length"
            return Skipped(pair.origin, "identical answers", detail)
        prompt, chosen, rejected, *others = (np.array(part, np.int32) for part in cut)
        return EncodedPairRow(
            *(prompt, chosen, rejected, pair.margin),
            origin=pair.origin,
            group=digest(prompt_alone.ids),
            subset=pair.subset,
            truncated=cut != whole,
            others=tuple(others),
        )


@dataclass(frozen=True)
class StepEncoding:
    """How rows of a source become encoded responses in labelled steps, cut as method §3 has it."""

    chat: ChatFormat
    max_length: int
    max_prompt_length: int
    stored = StepRows

    @property
    def limits(self) -> dict[str, int]:
        """Limits to the number of ids."""
        return {"max_length": self.max_length, "max_prompt_length": self.max_prompt_length}

    def parse(
        self, rows: Iterable[Row | Skipped], reader: RowReader, stats: ReadStats
    ) -> Iterator[Steps]:
        """The labelled steps of the usable rows."""
        return parsed(rows, reader, as_steps, stats)

    def encode(self, items: Iterable[Steps]) -> Iterator[EncodedStepRow | Skipped]:
        """Each response encoded, or why it cannot be.

        Raises DenserlError when the limits leave no room for a response, and for a tokenizer that
        does not say where its tokens are in a text.
        """
        check_limits(self.max_length, self.max_prompt_length)
        chat, tokenizer = self.chat, self.chat.template.tokenizer
        if not tokenizer.is_fast:
            raise DenserlError(
                "process labels need a fast tokenizer, which says where its tokens are in a text",
                hint="name a folder with a tokenizer.json in model.tokenizer",
            )
        layouts: dict[int, Layout] = {}

        def laid(item: Steps) -> Sequence[Layout]:
            found = chat.answer_layouts(item.messages)
            layouts[id(item)] = found[1]
            return found

        encoded = _encoded(chat, items, laid)
        while chunk := list(islice(encoded, CHUNK)):
            usable = [
                (layouts.pop(id(item)), ids[1]) for item, ids in chunk if isinstance(ids, list)
            ]
            places = iter(place_answers(tokenizer, usable, chat.answer.lead, chat.answer.closing))
            for item, ids in chunk:
                yield ids if isinstance(ids, Skipped) else self._row(item, next(places), *ids)

    def _row(
        self, item: Steps, placed: Placed, prompt: Encoded, response: Encoded
    ) -> EncodedStepRow | Skipped:
        whole = join(prompt, response)
        cut = truncate(whole, self.max_length, self.max_prompt_length, self.chat.terminator_id)
        text = item.messages[-1]["content"]
        shift = text.find(placed.content)
        if shift < 0 or text[:shift].strip():
            return Skipped(item.origin, "the chat template changes the answer", "")
        starts, stops = step_places(item.steps)
        inner = cut_tokens(starts - shift, stops - shift, placed.begins, placed.ends)
        ends = np.array([*inner, len(whole[1]) - 2], np.int32)  # before the terminator
        if (np.diff(ends, prepend=-1) <= 0).any():
            return Skipped(item.origin, "two steps end in one token", "column of the steps")
        left = ends < len(cut[1]) - 1
        if not left.any():
            return Skipped(item.origin, "no whole step", f"in data.max_length {self.max_length}")
        return EncodedStepRow(
            prompt=np.array(cut[0], np.int32),
            response=np.array(cut[1], np.int32),
            ends=ends[left],
            labels=np.array(item.labels)[left],
            origin=item.origin,
            group=digest(prompt.ids),
            truncated=cut != whole,
        )


@dataclass(frozen=True)
class PromptEncoding:
    """How rows of a source become encoded prompts, cut on the left."""

    chat: ChatFormat
    max_prompt_length: int
    stored = PromptRows

    @property
    def limits(self) -> dict[str, int]:
        """Limits to the number of ids."""
        return {"max_prompt_length": self.max_prompt_length}

    def parse(
        self, rows: Iterable[Row | Skipped], reader: RowReader, stats: ReadStats
    ) -> Iterator[Prompt]:
        """The prompts of the usable rows."""
        return parsed(rows, reader, as_prompts, stats)

    def encode(self, prompts: Iterable[Prompt]) -> Iterator[Prompt | Skipped]:
        """Each prompt encoded, or why it cannot be."""
        chat, limit = self.chat, self.max_prompt_length
        for prompt, ids in _encoded(chat, prompts, lambda p: [chat.prompt_layout(p.messages)]):
            if isinstance(ids, Skipped):
                yield ids
                continue
            whole = ids[0].ids
            kept = np.array(whole[-limit:], np.int32)
            yield replace(prompt, ids=kept, truncated=len(whole) > limit)


def encode_pairs(
    chat: ChatFormat,
    pairs: Sequence[Pair],
    *,
    max_length: int,
    max_prompt_length: int,
    strict: bool = False,
    observer: Observer | None = None,
) -> EncodedPairs:
    """Encode and cut pairs as method §3 has it, all of them in memory.

    Raises DenserlError when the limits leave no room for a response, when no pair can be encoded
    and, with `strict`, when one cannot.
    """
    encoding = PairEncoding(chat, max_length, max_prompt_length)
    return EncodedPairs(*_kept(encoding.encode, pairs, strict, observer))


def encode_prompts(
    chat: ChatFormat,
    prompts: Sequence[Prompt],
    max_prompt_length: int,
    *,
    strict: bool = False,
    observer: Observer | None = None,
) -> EncodedPrompts:
    """Encode prompts and cut them on the left to `max_prompt_length` tokens, all in memory.

    Raises DenserlError when no prompt can be encoded and, with `strict`, when one cannot.
    """
    encoding = PromptEncoding(chat, max_prompt_length)
    return EncodedPrompts(*_kept(encoding.encode, prompts, strict, observer))


def _kept(
    encode: Callable[[Iterable[Item]], Iterator[Any]],
    items: Sequence[Item],
    strict: bool,
    observer: Observer | None,
) -> tuple[list[Any], list[Skipped], int]:
    """Encoded items, those that cannot be encoded, and how many were cut."""
    watched = with_progress(items, observer or Observer(), "tokenise", len(items))
    rows: list[Any] = []
    skipped: list[Skipped] = []
    for one in encode(watched):
        (skipped if isinstance(one, Skipped) else rows).append(one)
    check_usable(len(rows), skipped, strict=strict)
    return rows, skipped, sum(row.truncated for row in rows)


def _encoded(
    chat: ChatFormat, items: Iterable[Item], layouts: Callable[[Item], Sequence[Layout]]
) -> Iterator[tuple[Item, Any]]:
    """Yield each item with the ids of its layouts, or with the reason why it has none."""
    source = iter(items)
    while chunk := list(islice(source, CHUNK)):
        laid: list[Sequence[Layout] | Skipped] = []
        for item in chunk:
            try:
                laid.append(layouts(item))
            except DenserlError as error:
                laid.append(Skipped(item.origin, error.message, error.hint or ""))
        usable = [parts for parts in laid if not isinstance(parts, Skipped)]
        ids = iter(chat.tokenize([layout for parts in usable for layout in parts]))
        for item, parts in zip(chunk, laid, strict=True):
            yield item, parts if isinstance(parts, Skipped) else [next(ids) for _ in parts]
