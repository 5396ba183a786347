"""Encoded rows in Arrow record batches, mostly of memory-mapped files.

A row is made when it is asked for; until then it costs a few bytes, however long it is. What is
wanted of all rows, such as their lengths, comes as arrays.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from hashlib import blake2b
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from xxhash import xxh3_128

from denserl_cli.core.data.batches import EncodedPairRow
from denserl_cli.core.data.conversations import Prompt
from denserl_cli.core.data.sequences import Sequences, ranges
from denserl_cli.core.data.steps import EncodedStepRow

Item = TypeVar("Item", EncodedPairRow, EncodedStepRow, Prompt)
Self = TypeVar("Self", bound="Rows[Any]")

_IDS = pa.list_(pa.int32())
_ANSWERS = pa.list_(_IDS)
_DIGEST = 16
_SIDES = ("prompt", "chosen", "rejected")


class Batch(NamedTuple):
    """A part of the rows. name: of their source, which their origins leave out."""

    name: str
    columns: pa.RecordBatch


class Rows(Sequence[Item], ABC, Generic[Item]):
    """Rows in some order, made one by one."""

    schema: ClassVar[pa.Schema]

    def __init__(self, batches: Sequence[Batch], order: np.ndarray | None = None) -> None:
        """order: row numbers, counted over all batches; default: all rows as they come."""
        self._batches = batches
        self._starts = np.cumsum([0, *(batch.columns.num_rows for batch in batches)]).tolist()
        self._columns = [batch.columns.columns for batch in batches]
        self._known: dict[str, np.ndarray] = {}
        self.order = np.arange(self._starts[-1]) if order is None else order

    @classmethod
    def of(cls: type[Self], rows: Iterable[Any]) -> Self:
        """Rows that are held in memory."""
        return cls([Batch("", cls.batch(list(rows)))])

    def __len__(self) -> int:
        return len(self.order)

    @overload
    def __getitem__(self, place: int) -> Item: ...
    @overload
    def __getitem__(self: Self, place: slice) -> Self: ...
    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return self.take(np.arange(len(self))[place])
        number = int(self.order[place])
        part = bisect_right(self._starts, number) - 1
        name, columns = self._batches[part].name, self._columns[part]
        at = number - self._starts[part]
        return self._made(name, [column[at] for column in columns])

    def __iter__(self) -> Iterator[Item]:
        return (self[place] for place in range(len(self)))

    def take(self: Self, places: np.ndarray) -> Self:
        """The rows at some places of these; nothing is read."""
        taken = copy(self)
        taken.order = self.order[places]
        return taken

    def followed_by(self: Self, others: Self) -> Self:
        """These rows, then others."""
        if others._batches is self._batches:
            both = copy(self)
            both.order = np.concatenate([self.order, others.order])
            return both
        order = np.concatenate([self.order, others.order + self._starts[-1]])
        return type(self)([*self._batches, *others._batches], order)

    def identity(self) -> str:
        """Digest of the ids of all rows, in their order."""
        found = xxh3_128(self.order.tobytes())
        for batch in self._batches:
            for column in batch.columns.columns:
                for buffer in column.buffers() if pa.types.is_list(column.type) else ():
                    found.update(memoryview(buffer or b""))
        return found.hexdigest()

    def numbers(self, name: str) -> np.ndarray:
        """A column of numbers, or the lengths of a column of lists: (N,)."""
        if name not in self._known:
            column = self._column(name)
            if pa.types.is_list(column.type):
                column = pc.list_value_length(column)
            self._known[name] = column.to_numpy()
        return self._known[name][self.order]

    def groups(self) -> np.ndarray:
        """The number of each row's prompt: (N,), equal for equal prompts, from 0 by first use."""
        if "group" not in self._known:
            parts = self._column("group").dictionary_encode().chunks
            self._known["group"] = np.concatenate([part.indices.to_numpy() for part in parts])
        found = self._known["group"][self.order]
        _, first, numbers = np.unique(found, return_index=True, return_inverse=True)
        rank = np.empty(len(first), np.int64)
        rank[np.argsort(first)] = np.arange(len(first))
        return rank[numbers]

    def _column(self, name: str) -> pa.ChunkedArray:
        parts = [batch.columns.column(name) for batch in self._batches]
        return pa.chunked_array(parts, self.schema.field(name).type)

    @classmethod
    @abstractmethod
    def batch(cls, rows: Sequence[Item], name: str = "") -> pa.RecordBatch:
        """The columns of some rows. name: with which their origins begin."""

    @abstractmethod
    def _made(self, name: str, values: Sequence[pa.Scalar]) -> Item:
        """A row from its values, in the schema's order. name: of its source."""


class PairRows(Rows[EncodedPairRow]):
    """Encoded preference pairs."""

    schema = pa.schema(
        [
            ("prompt", _IDS),
            ("chosen", _IDS),
            ("rejected", _IDS),
            ("margin", pa.float64()),
            ("origin", pa.string()),
            ("group", pa.binary(_DIGEST)),
            ("subset", pa.string()),
            ("truncated", pa.bool_()),
            ("others", _ANSWERS),
        ]
    )

    @classmethod
    def batch(cls, rows: Sequence[EncodedPairRow], name: str = "") -> pa.RecordBatch:
        """The columns of some pairs."""
        columns: dict[str, Any] = {
            field: [getattr(row, field) for row in rows] for field in cls.schema.names
        }
        for side in _SIDES:
            columns[side] = _lists(columns[side])
        others = columns["others"]
        offsets = np.cumsum([0, *map(len, others)]).astype(np.int32)
        answers = _lists([answer for row in others for answer in row])
        columns["others"] = pa.ListArray.from_arrays(offsets, answers)
        columns["origin"] = [row.origin.removeprefix(name) for row in rows]
        columns["group"] = [row.group or digest(row.prompt) for row in rows]
        return pa.RecordBatch.from_pydict(columns, cls.schema)

    def _made(self, name: str, values: Sequence[pa.Scalar]) -> EncodedPairRow:
        prompt, chosen, rejected = map(_ids, values[:3])
        margin, origin, group, subset, truncated = (value.as_py() for value in values[3:8])
        origin = name + origin
        others = tuple(answer.values.to_numpy().copy() for answer in values[8])
        return EncodedPairRow(
            prompt, chosen, rejected, margin, origin, group, subset, truncated, others
        )

    def other_lengths(self) -> np.ndarray:
        """Tokens of all other answers of rankings, row by row: (O,)."""
        counts = self.numbers("others")
        if "other_lengths" not in self._known:
            found = pc.list_value_length(pc.list_flatten(self._column("others")))
            self._known["other_lengths"] = found.to_numpy()
        everywhere = self._known["others"]
        starts = (everywhere.cumsum() - everywhere)[self.order]
        return self._known["other_lengths"][ranges(starts, counts)]


class StepRows(Rows[EncodedStepRow]):
    """Encoded responses in labelled steps."""

    schema = pa.schema(
        [
            ("prompt", _IDS),
            ("response", _IDS),
            ("ends", _IDS),
            ("labels", pa.list_(pa.float64())),
            ("origin", pa.string()),
            ("group", pa.binary(_DIGEST)),
            ("truncated", pa.bool_()),
        ]
    )

    @classmethod
    def batch(cls, rows: Sequence[EncodedStepRow], name: str = "") -> pa.RecordBatch:
        """The columns of some rows."""
        columns: dict[str, Any] = {
            field: [getattr(row, field) for row in rows] for field in cls.schema.names
        }
        for part in ("prompt", "response", "ends"):
            columns[part] = _lists(columns[part])
        columns["origin"] = [row.origin.removeprefix(name) for row in rows]
        columns["group"] = [row.group or digest(row.prompt) for row in rows]
        return pa.RecordBatch.from_pydict(columns, cls.schema)

    def _made(self, name: str, values: Sequence[pa.Scalar]) -> EncodedStepRow:
        origin, group, truncated = (value.as_py() for value in values[4:])
        prompt, response, ends, labels = map(_ids, values[:4])
        return EncodedStepRow(prompt, response, ends, labels, name + origin, group, truncated)

    def lengths(self) -> np.ndarray:
        """Tokens of each prompt and its response together: (N,)."""
        return self.numbers("prompt") + self.numbers("response")


class PromptRows(Rows[Prompt]):
    """Encoded prompts; the other columns of a row are kept as JSON."""

    schema = pa.schema(
        [
            ("ids", _IDS),
            ("messages", pa.string()),
            ("row", pa.string()),
            ("origin", pa.string()),
            ("group", pa.binary(_DIGEST)),
            ("truncated", pa.bool_()),
        ]
    )

    @classmethod
    def batch(cls, rows: Sequence[Prompt], name: str = "") -> pa.RecordBatch:
        """The columns of some prompts."""
        columns = {
            "ids": _lists([prompt.ids for prompt in rows]),
            "messages": [json.dumps(prompt.messages) for prompt in rows],
            "row": [json.dumps(prompt.row, default=str) for prompt in rows],
            "origin": [prompt.origin.removeprefix(name) for prompt in rows],
            "group": [digest(prompt.ids) for prompt in rows],
            "truncated": [prompt.truncated for prompt in rows],
        }
        return pa.RecordBatch.from_pydict(columns, cls.schema)

    def _made(self, name: str, values: Sequence[pa.Scalar]) -> Prompt:
        messages, row, origin, _, truncated = (value.as_py() for value in values[1:])
        texts = json.loads(messages), name + origin, json.loads(row)
        return Prompt(*texts, _ids(values[0]), truncated)


def digest(ids: np.ndarray | Sequence[int]) -> bytes:
    """What tells apart prompts: 16 bytes of their ids."""
    return blake2b(np.array(ids, np.int32).tobytes(), digest_size=_DIGEST).digest()


def pair_lengths(rows: Sequence[EncodedPairRow]) -> np.ndarray:
    """Tokens of each pair's prompt, chosen and rejected response: (N, 3); no row is read."""
    if isinstance(rows, PairRows):
        return np.stack([rows.numbers(side) for side in _SIDES], axis=1)
    return np.array([[len(getattr(row, side)) for side in _SIDES] for row in rows]).reshape(-1, 3)


def sequences_of(rows: Sequence[EncodedPairRow]) -> Sequences:
    """The sequences of pairs and rankings; no row of `PairRows` is read."""
    prompts, *sides = pair_lengths(rows).T
    if isinstance(rows, PairRows):
        others, more = rows.numbers("others"), rows.other_lengths()
    else:
        others = np.array([len(row.others) for row in rows], np.int64)
        more = np.array([len(answer) for row in rows for answer in row.others], np.int64)
    responses = np.concatenate([*sides, more])
    lengths = responses + np.concatenate([prompts, prompts, np.repeat(prompts, others)])
    return Sequences(others, lengths, responses)


def _lists(rows: Sequence[np.ndarray]) -> pa.ListArray:
    """A column of ids."""
    offsets = np.cumsum([0, *map(len, rows)]).astype(np.int32)
    ids = np.concatenate([np.empty(0, np.int32), *rows]).astype(np.int32, copy=False)
    return pa.ListArray.from_arrays(offsets, ids)


def _ids(value: pa.Scalar) -> np.ndarray:
    """A copy, so that nothing holds on to the file."""
    return value.values.to_numpy().copy()
