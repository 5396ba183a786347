"""Blocks and command lines of a Markdown page, for the tests that run what a page shows."""

from __future__ import annotations

import re
import shlex
from pathlib import Path


def blocks(page: Path, language: str) -> list[str]:
    """Fenced blocks of a language, or of several with `|` between them."""
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^```(?:{language})\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands(page: Path) -> list[list[str]]:
    """Command lines in the order of the page, without prompts, comments and continuations."""
    found = []
    for block in blocks(page, "bash|sh|shell|console"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            if words:
                found.append(words)
    return found


def dead_links(page: Path) -> list[str]:
    """Relative links to files that are not there."""
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    return [link for link in links if not (page.parent / link).exists()]
