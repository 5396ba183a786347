"""Plots as SVG for light and dark windows: drawn by matplotlib, coloured by CSS."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = {
    "ink": ("#010101", "#1b1f24", "#e6e9ed"),
    "quiet": ("#020202", "#5b6570", "#a0a9b4"),
    "line": ("#030303", "#d5dae0", "#363d46"),
    "0": ("#040400", "#0b62c4", "#6cb0ff"),
    "1": ("#040401", "#b8500c", "#ff9f5a"),
    "2": ("#040402", "#1a7f4b", "#5bd08f"),
    "3": ("#040403", "#8a3fb0", "#d79bf5"),
    "4": ("#040404", "#a11d4b", "#ff8fb0"),
    "5": ("#040405", "#5c6b00", "#c8d65a"),
}
"""By name: the colour that matplotlib draws with, a marker that a CSS variable replaces; the
variable's value in light windows; its value in dark ones."""
COUNTED = ("step", "iteration")
"""Labels of x-axes that count: their ticks are whole numbers."""
INK, QUIET, LINE, *CYCLE = (marker for marker, _, _ in _COLOURS.values())
DASHES = ("-", "--", "-.", ":")
MARKERS = "osD^vP"


def css() -> str:
    """The CSS variables of the plots' colours."""
    light, dark = (
        " ".join(f"--plot-{name}: {row[index]};" for name, row in _COLOURS.items())
        for index in (1, 2)
    )
    return f":root {{ {light} }} @media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}"


@dataclass(frozen=True)
class Plot:
    """A plot of a report.

    Attributes:
        name: Of its file, without the suffix.
        title: What it shows, for people.
        svg: An `<svg>` element whose colours are the variables of `css`.
    """

    name: str
    title: str
    svg: str

    @property
    def file(self) -> str:
        """The content of an SVG file with the plot."""
        style = f"<style>{css()} text {{ font-family: system-ui, sans-serif; }}</style>"
        tag = '<svg xmlns="http://www.w3.org/2000/svg"'
        return re.sub("^<svg([^>]*)>", rf"{tag}\1>{style}", self.svg, count=1) + "\n"


@contextmanager
def drawing(
    name: str, title: str, into: list[Plot], x: str, y: str, below: float = 0.17
) -> Iterator[Axes]:
    """Yield axes to draw on; afterwards the plot is added, unless nothing was drawn.

    Args:
        name: Of the plot.
        title: Of the plot.
        into: The plot is appended to it.
        x: Label of the x-axis.
        y: Label of the y-axis.
        below: Share of the height that is under the axes.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with matplotlib.rc_context(_style(name)):
        figure = Figure(figsize=(4.4, 2.9))
        axes = figure.add_axes((0.16, below, 0.8, 0.9 - below))
        yield axes
        if axes.has_data():
            axes.set(xlabel=x, ylabel=y)
            if x in COUNTED:
                axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
            axes.set_title(title, loc="left")
            _label_underscores(axes)
            if len(axes.get_legend_handles_labels()[0]) > 1:
                axes.legend()
            into.append(Plot(name, title, _svg(figure, name)))


def _label_underscores(axes: Axes) -> None:
    """Put a zero-width space before labels that begin with `_`: legends would leave them out.

    The labels that matplotlib makes for elements without one stay as they are.
    """
    found: list[Any] = [*axes.get_children(), *axes.containers]
    for drawn in found:
        label = str(drawn.get_label())
        if re.match(r"_(?!child\d+$|nolegend_$)", label):
            drawn.set_label(f"\u200b{label}")


def look(index: int) -> dict[str, Any]:
    """Colour and dashes of the line of a run, so that lines differ also without colour."""
    return {"color": CYCLE[index % len(CYCLE)], "linestyle": DASHES[index % len(DASHES)]}


def _style(name: str) -> Any:
    return {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "font.size": 9,
        "font.sans-serif": ["DejaVu Sans"],
        "axes.titlesize": 10,
        "axes.titlecolor": INK,
        "axes.labelcolor": QUIET,
        "axes.edgecolor": LINE,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": LINE,
        "grid.linewidth": 0.5,
        "text.color": INK,
        "text.parse_math": False,
        "xtick.color": LINE,
        "ytick.color": LINE,
        "xtick.labelcolor": QUIET,
        "ytick.labelcolor": QUIET,
        "legend.frameon": False,
        "legend.fontsize": 8,
        "lines.linewidth": 1.6,
        "lines.markersize": 4,
        "axes.formatter.useoffset": False,
    }


def _svg(figure: Figure, name: str) -> str:
    """The `<svg>` element, without metadata and namespaces, with unique ids and CSS variables."""
    out = io.StringIO()
    with warnings.catch_warnings():  # letters that matplotlib's font lacks are drawn by the browser
        warnings.filterwarnings("ignore", "Glyph")
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    text = out.getvalue()
    text = text[text.index("<svg") :].strip()
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text)
    text = text.replace("xlink:href", "href")
    text = re.sub(r' id="', rf' id="{name}-', text)
    text = re.sub(r'(href="#|url\(#)', rf"\1{name}-", text)
    for variable, (marker, _, _) in _COLOURS.items():
        text = text.replace(marker, f"var(--plot-{variable})")
    return text
