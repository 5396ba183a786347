"""Self-contained HTML pages: templates filled with data, no network."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup


def render(template: str, **values: Any) -> str:
    """Fill a template of this folder; a missing value is an error.

    Texts are escaped, except in Markdown (`.md.j2`).
    """
    return _environment().get_template(template).render(**values)


def embedded(data: object) -> Markup:
    """Data as JSON for the inside of a `<script>`: no text can end the element."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def plotly_js() -> Markup:
    """The library of the charts, for the inside of a `<script>`: 4.8 MB."""
    from plotly.offline import get_plotlyjs

    return Markup(get_plotlyjs())


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("denserl_cli", "pages"),
        autoescape=lambda name: not (name or "").endswith(".md.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["embedded"] = embedded
    environment.globals["plotly_js"] = plotly_js
    return environment
