"""A data report as lines of text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from denserl_cli.core.data.skipped import skipped_report
from denserl_cli.core.recipe.document import to_yaml

if TYPE_CHECKING:
    from denserl_cli.core.inspection.data_report import DataReport
    from denserl_cli.core.inspection.data_tally import Example

_SHOWN = 600
"""Characters of a text that are shown from its beginning or end."""


def data_report_lines(report: DataReport) -> Iterator[str]:
    """Describe a source, one fact a line."""
    yield f"{report.source}: {report.rows:,} rows"
    yield "columns:"
    width = max(map(len, map(str, report.columns)), default=0)
    for name, column in report.columns.items():
        common = sorted(column.types, key=lambda kind: -column.types[kind])
        types = ", ".join(common[:3]) or "empty"
        filled = "" if column.filled == report.rows else f" (in {column.filled:,} rows)"
        yield f"  {name!s:{width}}  {types}{filled}"
    yield from _layout(report)
    yield f"usable: {report.usable:,} {report.kind} of {report.prompts:,} prompts"
    for line in skipped_report(report.skipped):
        yield f"skipped: {line}"
    for line in report.remarks:
        yield f"notice: {line}"
    for name, lengths in report.lengths.items():
        yield (
            f"{report.unit} of {name}: median {lengths.median:,.0f}, 90 % up to "
            f"{lengths.ninety_percent:,.0f}, longest {lengths.longest:,}"
        )
    if report.cut is not None:
        yield f"cut to the recipe's limits: {report.cut:,}"
    yield f"duplicates: {report.duplicates:,}"
    if report.shared_prompts is not None:
        yield f"prompts shared with the evaluation: {report.shared_prompts:,}"
    if report.longer_is_better is not None:
        yield f"longer answer is the better one: {report.longer_is_better:.1%}"
    if report.example is not None:
        yield from _example(report.example)


def _layout(report: DataReport) -> Iterator[str]:
    if report.format and report.recognized:
        yield f"layout: looks like {report.format} and is read so here; set format: {report.format}"
    else:
        yield f"layout: {report.format or ('as mapped' if report.mapping else 'plain')}"
    if report.mapping:
        yield "mapping, which the source may change:"
        yield from (f"  {line}" for line in to_yaml(report.mapping).rstrip().splitlines())


def _example(example: Example) -> Iterator[str]:
    yield f"example: {example.origin}"
    yield "  prompt:"
    yield from _block(example.prompt, from_end=True)
    if example.prompt_tokens is not None:
        before = example.last_prompt_ids
        yield f"  the answer begins at token {example.prompt_tokens}, after …{before}"
    for name, text in example.answers.items():
        ids = example.first_answer_ids.get(name)
        yield f"  {name}{f': {ids}…' if ids else ''}:"
        yield from _block(text)


def _block(text: str, *, from_end: bool = False) -> Iterator[str]:
    if len(text) > _SHOWN:
        text = f"…{text[-_SHOWN:]}" if from_end else f"{text[:_SHOWN]}…"
    yield from (f"    | {line}" for line in text.split("\n"))
