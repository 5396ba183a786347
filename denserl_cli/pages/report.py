"""A report as a page, or as Markdown with its plots beside it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from denserl_cli.core.reporting.drawing import css
from denserl_cli.core.reporting.report import Report
from denserl_cli.core.reporting.samples import Segment
from denserl_cli.core.system.files import replaced_folder, write_text
from denserl_cli.pages import render


def write_page(report: Report, file: Path) -> None:
    """Write the report as one page that needs no other file and no network."""
    page = render("report.html.j2", title=f"denserl report: {report.title}", report=report,
                  plot_css=css())  # fmt: skip
    write_text(file, page)


def write_markdown(report: Report, file: Path) -> None:
    """Write the report as Markdown, its plots into a folder beside it."""
    folder = file.with_name(f"{file.stem}-plots")
    with replaced_folder(folder) as aside:
        for section in report.sections:
            for plot in section.plots:
                write_text(aside / f"{plot.name}.svg", plot.file)
    text = render(
        "report.md.j2",
        report=report,
        folder=quote(folder.name),
        literal=literal,
        listing=listing,
    )
    write_text(file, re.sub(r"\n{3,}", "\n\n", text))


def literal(text: str) -> str:
    """Text as Markdown that shows it as it is, on one line."""
    shown = text.replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\`*\[\]|#!])", r"\\\1", " ".join(shown.split()))


def listing(segments: Sequence[Segment]) -> str:
    """Segments as a block of code, a line each, with the reward before the text."""
    texts = [json.dumps(one.text, ensure_ascii=False)[1:-1] for one in segments]
    lines = [f"{one.reward:>8}  {text}" for one, text in zip(segments, texts, strict=True)]
    longest = max(map(len, re.findall("`+", "".join(lines))), default=0)
    fence = "`" * max(3, longest + 1)
    return "\n".join([f"{fence}text", *lines, fence])
