"""`denserl segment`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from denserl_cli.commands.common import (
    DryRunOption,
    JsonOption,
    ModelOption,
    OutOption,
    PreferencesOption,
    RecipeOption,
    SetOption,
    print_plan,
    read_recipe,
)
from denserl_cli.core.errors import DenserlError

if TYPE_CHECKING:
    from denserl_cli.core.inspection import Answer
    from denserl_cli.core.recipe import Recipe
    from denserl_cli.core.tracking import Observer

EXAMPLE = "Example: denserl segment --recipe sandbox-segment --limit 2"


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
    limit: Annotated[int, typer.Option("--limit", min=1, help="Pairs of the data to show.")] = 2,
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
    loaded = read_recipe("segment", recipe, settings, data=data, model=model)
    folder = out or Path("runs") / loaded.name
    if dry_run:
        print_plan("segment", loaded, folder)
        return
    from denserl_cli.console import make_observer, print_segments
    from denserl_cli.core.cutoffs import PAIRS
    from denserl_cli.core.inspection import Inspector, as_document
    from denserl_cli.core.run import RunFolder
    from denserl_cli.worker import quiet_libraries

    quiet_libraries()
    with make_observer() as observer:
        run = RunFolder(folder, loaded)
        inspector = Inspector(loaded, run, observer, rewards=calibrate is None)
        pairs = limit if calibrate is None else PAIRS
        answers = _answers(inspector.recipe, text, file, prompt, pairs, observer)
        if calibrate is not None:
            cutoff = inspector.calibrate(answers, calibrate)
            _report_cutoff(cutoff, calibrate, len(answers), as_json)
            return
        responses = inspector.segment(answers)
    if as_json:
        typer.echo(json.dumps(as_document(inspector.recipe, responses), ensure_ascii=False))
    else:
        print_segments(responses)


def _answers(
    recipe: Recipe,
    text: str | None,
    file: Path | None,
    prompt: str,
    limit: int,
    observer: Observer,
) -> list[Answer]:
    from denserl_cli.core.inspection import Answer, answers_of

    if text is not None and file is not None:
        raise DenserlError("--text and --file exclude each other", hint="give one of them")
    if file is not None:
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DenserlError(f"--file {file}: {error}", hint="name a UTF-8 text file") from error
    if text is None:
        return answers_of(recipe, limit, observer)
    if not text.strip():
        raise DenserlError("the text to segment is empty", hint="give some text")
    label = "text" if file is None else str(file)
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": text}]
    return [Answer(label, turns)]


def _report_cutoff(cutoff: float, length: float, responses: int, as_json: bool) -> None:
    if as_json:
        found = {"cutoff": cutoff, "segment_length": length, "responses": responses}
        typer.echo(json.dumps(found))
        return
    typer.echo(
        f"cutoff {cutoff:.4f} nats gives segments of about {length:g} tokens "
        f"({responses} responses); use it with --set segmentation.cutoff={cutoff:.4f}"
    )
