"""`denserl init`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Literal, get_args

import typer

from denserl_cli.commands.help import RECIPE
from denserl_cli.core.errors import DenserlError, RecipeError

EXAMPLE = "Example: denserl init my.yaml --model Qwen/Qwen3-0.6B --data pairs.jsonl"

Granularity = Literal["segment", "token", "bandit"]


def init(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="New recipe.")] = Path(
        "my-recipe.yaml"
    ),
    model: Annotated[
        str | None,
        typer.Option(
            "--model", metavar="PATH_OR_HUB_NAME", help="Backbone.", rich_help_panel=RECIPE
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data", metavar="PATH_OR_HUB_NAME", help="Preference pairs.", rich_help_panel=RECIPE
        ),
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            "--prompts",
            metavar="PATH_OR_HUB_NAME",
            help="Prompts for train-ppo; those of the pairs without it.",
            rich_help_panel=RECIPE,
        ),
    ] = None,
    granularity: Annotated[
        Granularity | None,
        typer.Option("--granularity", help="What gets a reward.", rich_help_panel=RECIPE),
    ] = None,
    gpus: Annotated[
        int | None,
        typer.Option(
            "--gpus",
            min=1,
            max=100_000,
            metavar="N",
            help="GPUs that train together; 1 for a CPU too.",
            rich_help_panel=RECIPE,
        ),
    ] = None,
) -> None:
    """Write a recipe for your model and data; asks what it is not told."""
    from denserl_cli.core.recipe.starter import Start, starter_recipe

    if path.exists():
        hint = "choose another path, or remove it first"
        raise DenserlError(f"{path} exists already", hint=hint)
    if path.suffix not in (".yaml", ".yml"):
        raise DenserlError(f"{path}: a recipe is a YAML file", hint=f"name it {path.name}.yaml")
    asked = _can_ask()
    if not asked and (missing := [n for n, v in (("--model", model), ("--data", data)) if not v]):
        hint = f"add {' and '.join(missing)}, or run it on a terminal, where it asks"
        raise DenserlError(f"init needs {' and '.join(missing)}", hint=hint)
    if asked:
        model = model or _ask("Backbone, a hub name or a folder", "Qwen/Qwen3-0.6B")
        data = data or _ask("Preference pairs, a hub name or a file")
        prompts = prompts or _ask("Prompts for train-ppo, a hub name or a file", data)
        granularity = granularity or _choose("Rewards for each", get_args(Granularity))
        gpus = gpus or _count("GPUs that train together; 1 for a CPU too")
    assert model and data
    prompts = prompts or data
    rows = (_rows(data), _rows(prompts))
    start = Start(model, data, prompts, granularity or "segment", gpus or 1, *rows)
    _write(path, starter_recipe(str(path), start))
    _tell_problems(path)
    typer.echo(f"wrote {path}; look at it, then: denserl validate {shlex.quote(str(path))}")


def _rows(path: str) -> int | None:
    """The rows of a local file; None for a hub name, and for what cannot be read."""
    from denserl_cli.core.data.local_rows import count_local_rows
    from denserl_cli.core.recipe.schema import Source

    try:
        return count_local_rows((Source(path),))
    except DenserlError:
        return None  # told when the recipe is written


def _tell_problems(path: Path) -> None:
    """Say what the new recipe cannot read of its files: columns that it does not know, mostly."""
    from denserl_cli.core.data.local_rows import first_rows_problems
    from denserl_cli.core.recipe import load_recipe

    for problem in first_rows_problems(load_recipe(str(path))):
        typer.echo(f"to be mended in {path}: {problem}", err=True)


def _can_ask() -> bool:
    return sys.stdin.isatty()


def _ask(question: str, default: str | None = None) -> str:
    return str(typer.prompt(question, default=default, err=True)).strip()


def _choose(question: str, choices: tuple[Granularity, ...]) -> Granularity:
    while True:
        answer = _ask(f"{question} ({', '.join(choices)})", choices[0])
        for choice in choices:
            if answer == choice:
                return choice


def _count(question: str) -> int:
    while True:
        answer = _ask(question, "1")
        if answer.isdecimal() and int(answer) > 0:
            return int(answer)


def _write(path: Path, text: str) -> None:
    """Write the recipe, unless something in it is wrong."""
    from denserl_cli.core.recipe import load_recipe
    from denserl_cli.core.system.files import write_text

    with TemporaryDirectory() as folder:
        draft = Path(folder) / path.name
        draft.write_text(text, encoding="utf-8")
        try:
            load_recipe(str(draft))
        except RecipeError as error:
            problems = "\n".join(one.replace(f"{folder}/", "") for one in error.problems)
            raise DenserlError(problems, hint="nothing was written") from error
    write_text(path, text)
