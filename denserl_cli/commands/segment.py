"""`denserl segment`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from denserl_cli.commands.common import (
    DryRunOption,
    JsonOption,
    ModelOption,
    OutOption,
    PreferencesOption,
    RecipeOption,
    SetOption,
    check_writable,
    print_plan,
    read_recipe,
)
from denserl_cli.core.errors import DenserlError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from denserl_cli.core.inspection.compare import View
    from denserl_cli.core.inspection.inspector import Answer
    from denserl_cli.core.inspection.statistics import CutStatistics
    from denserl_cli.core.observer import Observer
    from denserl_cli.core.recipe import Recipe
    from denserl_cli.core.scoring.calibration import Calibration

EXAMPLE = "Example: denserl segment --recipe sandbox-segment --limit 2"
SHOWN, ON_A_PAGE = 2, 100
"""Pairs that are read where nobody says how many: for a terminal, for a page."""


def segment(
    recipe: RecipeOption,
    overrides: SetOption = None,
    out: OutOption = None,
    text: Annotated[str | None, typer.Option("--text", help="One response to segment.")] = None,
    prompt: Annotated[
        str, typer.Option("--prompt", help="The user's message before --text or --file.")
    ] = "",
    file: Annotated[
        Path | None, typer.Option("--file", metavar="FILE", help="A text file as the response.")
    ] = None,
    data: PreferencesOption = None,
    model: ModelOption = None,
    limit: Annotated[
        int | None,
        typer.Option(
            "--limit",
            min=1,
            help="Pairs of the data to read: 2, on a page 100, for --stats and --calibrate 250.",
        ),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option("--html", metavar="FILE", help="Write a page to look at, for any browser."),
    ] = None,
    stats: Annotated[
        bool, typer.Option("--stats", help="Lengths and counts of segments at several cutoffs.")
    ] = False,
    cutoffs: Annotated[
        str | None,
        typer.Option("--cutoffs", metavar="NATS,NATS…", help="The cutoffs of --stats."),
    ] = None,
    compare: Annotated[
        str | None,
        typer.Option(
            "--compare",
            metavar="OTHER",
            help="Cut by another cutoff, recipe, run folder or model too, and compare.",
        ),
    ] = None,
    calibrate: Annotated[
        float | None,
        typer.Option(
            "--calibrate",
            metavar="LENGTH",
            help="Propose the cutoff that gives segments of about LENGTH tokens on this data.",
        ),
    ] = None,
    as_json: JsonOption = False,
    dry_run: DryRunOption = False,
) -> None:
    """Show how the model segments a text, a file or preference data, with rewards if trained."""
    settings = list(overrides or ())
    if calibrate is not None:  # any cutoff will do: the entropies do not depend on it
        settings = ["segmentation={granularity: segment, cutoff: 0.0, cut: entropy}", *settings]
        settings[1:1] = [f"segmentation.{name}=null" for name in ("quantile", "cut_seed")]
    _check_options(text or file, html, stats, compare, calibrate)
    levels = _levels(cutoffs, stats)
    loaded = read_recipe("segment", recipe, settings, data=data, model=model)
    folder = out or Path("runs") / loaded.name
    if dry_run:
        print_plan("segment", loaded, folder)
        return
    from denserl_cli.core.inspection.compare import Other, View
    from denserl_cli.core.inspection.inspector import Inspector
    from denserl_cli.core.inspection.statistics import statistics
    from denserl_cli.core.runs.folder import RunFolder
    from denserl_cli.core.stages.run import quiet_libraries
    from denserl_cli.terminal.dashboard import make_observer

    quiet_libraries()
    with make_observer() as observer:
        run = RunFolder(folder, loaded)
        inspector = Inspector(loaded, run, observer, rewards=calibrate is None)
        with_calibrated_cutoff = inspector.recipe
        other = None if compare is None else Other.named(compare, with_calibrated_cutoff, folder)
        pairs = _pairs(limit, html, stats or calibrate is not None)
        answers = _answers(with_calibrated_cutoff, text, file, prompt, pairs, observer)
        if calibrate is not None:
            _report_cutoff(inspector.calibrate(answers, calibrate), len(answers), as_json)
            return
        views = [View.of(loaded.name, inspector, answers, observer)]
        del inspector  # two models need not fit into memory together
        if other is not None:
            views.append(other.view(views[0], answers, observer))
    found = statistics(views[0].cut, views[0].traces, levels) if stats else []
    if html is not None:
        _write_page(html, with_calibrated_cutoff, folder, views, found)
    if as_json:
        typer.echo(json.dumps(_document(views, found), ensure_ascii=False))
    elif html is None or found:
        _print(views, found)


def _check_options(
    text: str | Path | None,
    html: Path | None,
    stats: bool,
    compare: str | None,
    calibrate: float | None,
) -> None:
    """Raise DenserlError for what cannot go together, before any model is loaded."""
    alone = {"--stats": stats, "--compare": compare is not None}
    alone["--calibrate"] = calibrate is not None
    given = [name for name, is_given in alone.items() if is_given]
    if len(given) > 1:
        raise DenserlError(f"{' and '.join(given)} exclude each other", hint="give one of them")
    if calibrate is not None and html is not None:
        raise DenserlError("--calibrate makes no page", hint="use --stats --html to see lengths")
    if stats and text is not None:
        raise DenserlError("--stats is about a data set, not a text", hint="give --data instead")
    if html is not None:
        check_writable("--html", html)


def _levels(cutoffs: str | None, stats: bool) -> list[float]:
    """The numbers of --cutoffs."""
    if cutoffs is None:
        return []
    if not stats:
        raise DenserlError("--cutoffs belongs to --stats", hint="add --stats")
    try:
        levels = [float(part) for part in cutoffs.split(",")]
    except ValueError:
        levels = [math.nan]
    if not all(math.isfinite(level) and level >= 0 for level in levels):
        hint = "give numbers of nats, 0 or more, such as --cutoffs 1,1.5,2"
        raise DenserlError(f"--cutoffs {cutoffs}: not a list of cutoffs", hint=hint)
    return levels


def _pairs(limit: int | None, html: Path | None, many: bool) -> int:
    """How many pairs of the data are read."""
    from denserl_cli.core.scoring.calibration import PAIRS

    if limit is not None:
        return limit
    if many:
        return PAIRS
    return ON_A_PAGE if html is not None else SHOWN


def _write_page(
    file: Path,
    recipe: Recipe,
    folder: Path,
    views: Sequence[View],
    found: Sequence[CutStatistics],
) -> None:
    from denserl_cli.core.system.files import write_text
    from denserl_cli.pages.inspector import inspector_page

    first = views[0]
    rewards = "no reward model yet: segments and entropies alone"
    if any(trace.values is not None for trace in first.traces):
        rewards = f"reward model of {folder}"
        rewards += "" if first.cut.ready else ", without a normaliser"
    about = [f"reference {recipe.model.path}, {first.cut.description}", rewards]
    write_text(file, inspector_page(f"Segments of {recipe.name}", about, views, found))
    typer.echo(f"wrote {file}: {len(views[0].traces)} responses", err=True)


def _document(views: Sequence[View], found: Sequence[CutStatistics]) -> dict[str, Any]:
    """What --json prints."""
    from denserl_cli.core.inspection.compare import agreement
    from denserl_cli.core.inspection.inspector import as_document

    if found:
        return {"responses": len(views[0].traces), "cutoffs": [one.document() for one in found]}
    cuts = [[view.cut(trace) for trace in view.traces] for view in views]
    if len(views) == 1:
        return as_document(views[0].cut, cuts[0])
    return {
        "views": [
            {"name": view.name, **as_document(view.cut, cut)}
            for view, cut in zip(views, cuts, strict=True)
        ],
        "agreement": agreement(*cuts).document(),
    }


def _print(views: Sequence[View], found: Sequence[CutStatistics]) -> None:
    from denserl_cli.terminal.segments import print_comparison, print_segments, print_statistics

    first = views[0]
    if found:
        print_statistics(found, first.cut.cutoff)
    elif len(views) > 1:
        print_comparison(views)
    else:
        responses = [first.cut(trace) for trace in first.traces]
        print_segments(responses, first.cut.at_peaks)


def _answers(
    recipe: Recipe,
    text: str | None,
    file: Path | None,
    prompt: str,
    limit: int,
    observer: Observer,
) -> list[Answer]:
    from denserl_cli.core.inspection.inspector import Answer, answers_of

    if text is not None and file is not None:
        raise DenserlError("--text and --file exclude each other", hint="give one of them")
    if file is not None:
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            what = error.strerror if isinstance(error, OSError) else "not UTF-8"
            raise DenserlError(f"--file {file}: {what}", hint="name a UTF-8 text file") from error
    if text is None:
        return answers_of(recipe, limit, observer)
    if not text.strip():
        raise DenserlError("the text to segment is empty", hint="give some text")
    label = "text" if file is None else str(file)
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": text}]
    return [Answer(label, turns)]


def _report_cutoff(found: Calibration, responses: int, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({**found._asdict(), "responses": responses}))
        return
    typer.echo(
        f"cutoff {found.cutoff:.4f} nats gives segments of {found.segment_length:.1f} tokens on "
        f"average ({responses} responses); use it with "
        f"--set segmentation.cutoff={found.cutoff:.4f}"
    )
