"""Responses in steps that are known to be right or wrong: process labels."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from denserl_cli.core.data.column_paths import has_every, look_up
from denserl_cli.core.data.comparisons import number, paths_of
from denserl_cli.core.data.messages import Turns
from denserl_cli.core.data.row_checks import check_read, found_columns
from denserl_cli.core.data.unusable import UnusableRow, shown
from denserl_cli.core.recipe.schema import Columns

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from denserl_cli.core.data.row_formats import RowReader

SEPARATOR = "\n"
"""Stands between two steps of a response (TRL's default `step_separator`)."""
_BLANK_LINES = re.compile(r"\s*\n")


@dataclass(frozen=True)
class Steps:
    """A conversation that ends in an assistant turn, whose steps have labels."""

    messages: Turns
    steps: tuple[str, ...]
    labels: tuple[float, ...]
    """For each step: 1 where it is right, 0 where it is wrong, or a share in between."""
    origin: str
    """Where the row came from: file:line, or a data set's name and row number."""


@dataclass(frozen=True, eq=False)
class EncodedStepRow:
    """Labelled steps as int32 ids, cut to the length limits; the response ends in a terminator."""

    prompt: np.ndarray
    response: np.ndarray
    ends: np.ndarray
    """(K,) int32, the last token of each step that is left, counted from the response's first."""
    labels: np.ndarray
    """(K,) float64, of these steps."""
    origin: str
    group: bytes = b""
    """Digest of the whole prompt: the same for all rows of one prompt, however they were cut."""
    truncated: bool = False
    """Whether prompt or response was cut."""


class StepTargets(NamedTuple):
    """What a batch of R responses is trained on.

    Attributes:
        ends: (R, T) bool, the last tokens of labelled steps.
        labels: (R, T) float32, at these tokens; 0 elsewhere.
    """

    ends: Tensor
    labels: Tensor


def read_steps(
    fields: Mapping[str, Any], reader: RowReader
) -> tuple[Turns, list[str], list[float]]:
    """The prompt of a row, the steps of its answer and their labels.

    Raises:
        UnusableRow: One of them is not there or not what it should be.
    """
    columns = reader.mapping.columns or Columns()
    asked = Columns(prompt=columns.prompt or "prompt")
    for path in paths_of(asked.prompt):
        if look_up(fields, path) is None:
            raise UnusableRow("no prompt", f"column {path}: {found_columns(fields)}")
    steps_path, labels_path = columns.completions or "completions", columns.labels or "labels"
    steps, labels = _listed(fields, steps_path), _listed(fields, labels_path)
    if len(steps) != len(labels):
        raise UnusableRow(
            "wrong number of labels",
            f"column {labels_path}: found {len(labels)} for the {len(steps)} steps of column "
            f"{steps_path}",
        )
    texts = [_step(step, f"{steps_path}[{place}]") for place, step in enumerate(steps)]
    values = [_label(label, f"{labels_path}[{place}]") for place, label in enumerate(labels)]
    prompt, _ = reader.prompt(fields)
    path = paths_of(asked.prompt)[-1]
    if reader.messages.prompt(look_up(fields, path), path)[-1]["role"] == "assistant":
        raise UnusableRow("roles in the wrong order", f"column {path} ends with an answer")
    if reader.mapping.columns is None:
        check_read(fields, prompt)
    return prompt, texts, values


def _listed(fields: Mapping[str, Any], path: str) -> list[Any]:
    if look_up(fields, path) is None:
        raise UnusableRow(f"no {path}", found_columns(fields))
    found = look_up(fields, path if has_every(path) else f"{path}[*]")
    if not found:
        raise UnusableRow(f"empty {path}", f"column {path}: found an empty list")
    return list(found)


def _step(value: Any, path: str) -> str:
    if not isinstance(value, str):
        raise UnusableRow("wrong type", f"column {path}: found {shown(value)}, wanted a text")
    if not value.strip():
        raise UnusableRow("empty step", f"column {path}: found {shown(value)}")
    return value


def _label(value: Any, path: str) -> float:
    wanted = "wanted true, false, 1, 0 or a share in between"
    try:
        label = number(value, path, "bad label")
    except UnusableRow as error:
        detail = f"column {path}: found {shown(value)}, {wanted}"
        raise UnusableRow("bad label", detail) from error
    if not 0 <= label <= 1:
        raise UnusableRow("bad label", f"column {path}: found {shown(value)}, {wanted}")
    return label


def step_places(steps: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Where each step but the last ends in the text of all of them (`text_cuts.cut_tokens`).

    A step ends after its separator; blank lines before the next step belong to it.

    Returns:
        Starts and stops, (K - 1,) each, in characters.
    """
    lengths = [len(step) + len(SEPARATOR) for step in steps[:-1]]
    starts = np.array([*accumulate(lengths)], np.int64)
    blank = [_BLANK_LINES.match(step) for step in steps[1:]]
    return starts, starts + np.array([one.end() if one else 0 for one in blank], np.int64)


def step_targets(
    rows: Sequence[EncodedStepRow], width: int, device: torch.device | str | None = None
) -> StepTargets:
    """Ends and labels of R responses, padded to a width."""
    import torch

    ends, labels = np.zeros((len(rows), width), bool), np.zeros((len(rows), width), np.float32)
    for place, row in enumerate(rows):
        ends[place, row.ends] = True
        labels[place, row.ends] = row.labels
    return StepTargets(torch.from_numpy(ends).to(device), torch.from_numpy(labels).to(device))
