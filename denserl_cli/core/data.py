"""Preference pairs and prompts: read, checked row by row, encoded, split."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from denserl_cli.core.batches import (
    EncodedPairRow,
    PairBatch,
    SequenceBatch,
    collate_pairs,
    collate_sequences,
    global_batches,
    micro_batches,
)
from denserl_cli.core.chat import ChatFormat, EncodedPair, Layout, check_limits, truncate_pair
from denserl_cli.core.errors import DenserlError
from denserl_cli.core.rows import Turns, UnusableRow, has_tools, pair_of, prompt_of
from denserl_cli.core.sources import (
    Row,
    Skipped,
    check_usable,
    read_source,
    skipped_report,
    write_skipped,
)
from denserl_cli.core.tracking import Observer

if TYPE_CHECKING:
    from denserl_cli.core.recipe.schema import Source

__all__ = [
    "EncodedPairRow",
    "EncodedPairs",
    "EncodedPrompts",
    "Pair",
    "PairBatch",
    "PairSet",
    "Prompt",
    "PromptSet",
    "SequenceBatch",
    "Skipped",
    "check_usable",
    "collate_pairs",
    "collate_sequences",
    "encode_pairs",
    "encode_prompts",
    "global_batches",
    "micro_batches",
    "read_pairs",
    "read_prompts",
    "skipped_report",
    "split_pairs",
    "split_prompts",
    "write_skipped",
]

_CHUNK = 256


@dataclass(frozen=True)
class Pair:
    """A preference pair: two message lists with one prompt, each ending in an assistant turn."""

    chosen: Turns
    rejected: Turns
    margin: float | None
    origin: str
    """Where the row came from: file:line, or a data set's name and row number."""
    subset: str | None = None
    """The row's own column `subset`, which benchmarks have."""


@dataclass(frozen=True, eq=False)
class Prompt:
    """A prompt to answer, with the other columns of its row; `ids` come from `encode_prompts`."""

    messages: Turns
    origin: str
    row: dict[str, Any]
    ids: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))


Item = TypeVar("Item", Pair, Prompt)
T = TypeVar("T")


class PairSet(NamedTuple):
    """The usable pairs, and the rows that are none."""

    pairs: list[Pair]
    skipped: list[Skipped]


class PromptSet(NamedTuple):
    """The usable prompts, and the rows that are none."""

    prompts: list[Prompt]
    skipped: list[Skipped]


class EncodedPairs(NamedTuple):
    """Encoded pairs, those that the chat template cannot write, and how many were cut."""

    rows: list[EncodedPairRow]
    skipped: list[Skipped]
    truncated: int


class EncodedPrompts(NamedTuple):
    """Encoded prompts, those that the chat template cannot write, and how many were cut."""

    prompts: list[Prompt]
    skipped: list[Skipped]
    truncated: int


def read_pairs(
    sources: Sequence[Source],
    *,
    seed: int,
    strict: bool = False,
    notice: Callable[[str], None] | None = None,
) -> PairSet:
    """Read the preference pairs of a mixture of sources, in the order of the sources.

    notice: told once when prompts had to be guessed, and once when rows bring tools. Raises
    DenserlError when a source cannot be read, when no row is usable and, with `strict`, when one
    row is not.
    """
    guessed = []

    def parse(row: Row) -> Pair:
        pair = pair_of(row.fields)
        if pair.guessed:
            guessed.append(row.origin)
        subset = row.fields.get("subset")
        named = None if subset is None else str(subset)
        return Pair(pair.chosen, pair.rejected, pair.margin, row.origin, named)

    found = PairSet(*_read(sources, parse, seed, strict, notice))
    if guessed and notice is not None:
        notice(
            f"{len(guessed)} pairs are texts without a prompt (the first: {guessed[0]}): what both "
            "texts begin with, up to its last white space, is taken for the prompt"
        )
    return found


def read_prompts(
    sources: Sequence[Source],
    *,
    seed: int,
    strict: bool = False,
    notice: Callable[[str], None] | None = None,
) -> PromptSet:
    """Read the prompts of a mixture of sources, in the order of the sources; duplicates stay.

    notice: told once when rows bring tools. Raises DenserlError when a source cannot be read, when
    no row is usable and, with `strict`, when one row is not.
    """

    def parse(row: Row) -> Prompt:
        messages, others = prompt_of(row.fields)
        return Prompt(messages, row.origin, others)

    return PromptSet(*_read(sources, parse, seed, strict, notice))


def _read(
    sources: Sequence[Source],
    parse: Callable[[Row], Item],
    seed: int,
    strict: bool,
    notice: Callable[[str], None] | None,
) -> tuple[list[Item], list[Skipped]]:
    items: list[Item] = []
    skipped: list[Skipped] = []
    with_tools: list[str] = []
    for place, source in enumerate(sources):
        rng, usable = np.random.default_rng([seed, place]), []
        for row in read_source(source, rng):
            if isinstance(row, Skipped):
                skipped.append(row)
                continue
            try:
                usable.append(parse(row))
            except UnusableRow as error:
                skipped.append(Skipped(row.origin, error.reason, error.detail))
                continue
            if has_tools(row.fields):
                with_tools.append(row.origin)
        items += [usable[i] for i in _passes(len(usable), source.weight, rng)]
    if not items and not skipped:
        raise DenserlError(f"no rows in {', '.join(s.path for s in sources)}", hint="name others")
    check_usable(len(items), skipped, strict=strict)
    if with_tools and notice is not None:
        notice(f"the tools of {len(with_tools)} rows (the first: {with_tools[0]}) are ignored")
    return items, skipped


def _passes(count: int, weight: float, rng: np.random.Generator) -> list[int]:
    """Row numbers in `weight` passes: all of them for each whole pass, a random part for the rest.

    2.5 gives every row twice and half of them once more.
    """
    whole = int(weight)
    part = rng.choice(count, size=round((weight - whole) * count), replace=False)
    return [*list(range(count)) * whole, *sorted(part.tolist())]


def encode_pairs(
    chat: ChatFormat,
    pairs: Sequence[Pair],
    *,
    max_length: int,
    max_prompt_length: int,
    strict: bool = False,
    observer: Observer | None = None,
) -> EncodedPairs:
    """Encode and cut pairs as method §3 has it.

    Raises DenserlError when the limits leave no room for a response, when no pair can be encoded
    and, with `strict`, when one cannot.
    """
    check_limits(max_length, max_prompt_length)
    rows: list[EncodedPairRow] = []
    skipped: list[Skipped] = []
    truncated = 0

    def layouts(pair: Pair) -> Sequence[Layout]:
        return chat.pair_layouts(pair.chosen, pair.rejected)

    for pair, ids in _encoded(chat, pairs, layouts, skipped, observer or Observer()):
        whole = EncodedPair(*ids)
        cut = truncate_pair(whole, max_length, max_prompt_length, chat.terminator_id)
        if cut.chosen_ids == cut.rejected_ids:
            detail = "after the template's trimming and the cut to max_length"
            skipped.append(Skipped(pair.origin, "identical answers", detail))
            continue
        truncated += cut != whole
        prompt, chosen, rejected = (np.array(part, np.int32) for part in cut)
        digest = hashlib.blake2b(np.array(whole.prompt_ids, np.int32).tobytes(), digest_size=16)
        rows.append(
            EncodedPairRow(
                *(prompt, chosen, rejected, pair.margin, pair.origin, digest.digest()),
                subset=pair.subset,
                truncated=cut != whole,
            )
        )
    check_usable(len(rows), skipped, strict=strict)
    return EncodedPairs(rows, skipped, truncated)


def encode_prompts(
    chat: ChatFormat,
    prompts: Sequence[Prompt],
    max_prompt_length: int,
    *,
    strict: bool = False,
    observer: Observer | None = None,
) -> EncodedPrompts:
    """Encode prompts and cut them on the left to `max_prompt_length` tokens.

    Raises DenserlError when no prompt can be encoded and, with `strict`, when one cannot.
    """
    encoded: list[Prompt] = []
    skipped: list[Skipped] = []
    truncated = 0

    def layouts(prompt: Prompt) -> Sequence[Layout]:
        return [chat.prompt_layout(prompt.messages)]

    for prompt, (ids,) in _encoded(chat, prompts, layouts, skipped, observer or Observer()):
        truncated += len(ids) > max_prompt_length
        encoded.append(replace(prompt, ids=np.array(ids[-max_prompt_length:], np.int32)))
    check_usable(len(encoded), skipped, strict=strict)
    return EncodedPrompts(encoded, skipped, truncated)


def _encoded(
    chat: ChatFormat,
    items: Sequence[Item],
    layouts: Callable[[Item], Sequence[Layout]],
    skipped: list[Skipped],
    observer: Observer,
) -> Iterator[tuple[Item, list[list[int]]]]:
    """Yield each item with the ids of its layouts; add those without layouts to `skipped`."""
    observer.begin("tokenise", total=len(items))
    for start in range(0, len(items), _CHUNK):
        laid: list[tuple[Item, Sequence[Layout]]] = []
        part = items[start : start + _CHUNK]
        for item in part:
            try:
                laid.append((item, layouts(item)))
            except DenserlError as error:
                skipped.append(Skipped(item.origin, error.message, error.hint or ""))
        ids = iter(chat.tokenize([layout for _, parts in laid for layout in parts]))
        for item, parts in laid:
            yield item, [next(ids) for _ in parts]
        observer.advance(len(part))
    observer.end()


def split_pairs(
    rows: Sequence[EncodedPairRow], count: int, seed: int
) -> tuple[list[EncodedPairRow], list[EncodedPairRow]]:
    """Split into training and evaluation: about `count` pairs, at most a tenth, are held out.

    Pairs with one prompt stay on one side.
    """
    held = _held_out([row.group or row.prompt.tobytes() for row in rows], count, seed)
    return _sides(rows, held)


def split_prompts(
    prompts: Sequence[Prompt], count: int, seed: int
) -> tuple[list[Prompt], list[Prompt]]:
    """Split into training and evaluation: `count` prompts, at most a tenth, are held out.

    Equal prompts stay on one side.
    """
    return _sides(prompts, _held_out([prompt.ids.tobytes() for prompt in prompts], count, seed))


def _held_out(groups: Sequence[bytes], count: int, seed: int) -> set[int]:
    """Draw whole groups until `count` rows or a tenth is held out; a larger group stays."""
    members = defaultdict(list)
    for place, group in enumerate(groups):
        members[group].append(place)
    target, held = min(count, len(groups) // 10), set[int]()
    names = list(members)
    for draw in np.random.default_rng(seed).permutation(len(names)):
        if len(held) + len(members[names[draw]]) <= target:
            held.update(members[names[draw]])
    return held


def _sides(rows: Sequence[T], held: set[int]) -> tuple[list[T], list[T]]:
    return (
        [row for place, row in enumerate(rows) if place not in held],
        [row for place, row in enumerate(rows) if place in held],
    )
