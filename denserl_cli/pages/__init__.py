"""Self-contained HTML pages: templates filled with data, no network."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup


def render(template: str, **values: Any) -> str:
    """Fill a template of this folder; a missing value is an error.

    Texts are escaped, but for a `.md.j2`: a page in Markdown.
    """
    return _environment().get_template(template).render(**values)


def embedded(data: object) -> Markup:
    """Write data as JSON that may stand inside a `<script>`: no text can end the element."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def plotly_js() -> Markup:
    """The charts' library, to stand inside a `<script>`: 4.8 MB."""
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
