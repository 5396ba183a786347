"""How help reads: options and commands in groups, nothing cut off, and the page to read next.

Typer would draw its groups with rich, whose import alone takes longer than all the rest of
`denserl --help`; these classes write the same groups (`rich_help_panel`) as plain text.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

RECIPE, RUN, PROCESSES = "Recipe", "Run", "Several processes"
"""Groups of options that commands share."""

PAGES = {
    "init": "docs/recipes.md",
    "recipes list": "docs/recipes.md, docs/published.md",
    "recipes show": "docs/recipes.md",
    "recipes copy": "docs/recipes.md",
    "recipes schema": "docs/recipes.md",
    "validate": "docs/recipes.md",
    "data": "docs/data.md",
    "demo": "docs/sandbox.md",
    "train-rm": "docs/recipes.md, docs/data.md, docs/tracking.md, docs/surviving.md",
    "fit-function": "docs/recipes.md, docs/real-data.md",
    "import-normalizer": "docs/published.md",
    "train-ppo": "docs/recipes.md, docs/rewards.md, docs/tracking.md, docs/surviving.md",
    "segment": "docs/inspector.md, docs/cuts.md",
    "status": "docs/tracking.md",
    "report": "docs/report.md",
    "evaluate rm": "docs/evaluation.md",
    "evaluate policy": "docs/evaluation.md",
    "score": "docs/evaluation.md",
    "answer": "docs/benchmarks.md",
    "export": "docs/lora.md, docs/published.md",
    "plan": "docs/planning.md",
    "slurm": "docs/processes.md, docs/surviving.md",
    "doctor": "docs/report.md",
}
"""Where each command is described, by its words."""

_EVERYWHERE = ("quiet", "verbose")
"""Options of `denserl` itself that may also stand behind a command."""
_TYPE_NAMES = {"int": "N", "float": "NUMBER", "str": "TEXT", "path": "PATH"}


class Command(TyperCommand):
    """A command with grouped help, and with advice where a recipe is given in the other way."""

    def get_params(self, ctx: Any) -> list[Any]:
        """The command's own parameters, those that every command takes, and the help option."""
        *own, last = super().get_params(ctx)
        known = {param.name for param in own}
        root = ctx.find_root().command.params
        shared = [p for p in root if p.name in _EVERYWHERE and p.name not in known]
        return [*own, *shared, last]

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the words; a recipe in the wrong place gets told the right one."""
        if not ctx.resilient_parsing and not set(args) & set(ctx.help_option_names):
            self._check_recipe(ctx, args)
        return super().parse_args(ctx, args)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write arguments and options by group; those of no group come last."""
        _write_params(self.get_params(ctx), ctx, formatter)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the example, and below it where to read on."""
        if self.epilog:
            formatter.write(f"\n  {self.epilog}\n")  # uncut, for it is there to be pasted
        words = ctx.command_path.partition(" ")[2]
        if words in PAGES:
            with formatter.indentation():
                formatter.write_text(f"More: {PAGES[words]}")

    def _check_recipe(self, ctx: Any, args: list[str]) -> None:
        arguments = [p for p in self.params if p.param_type_name == "argument"]
        options = {opt for p in self.params for opt in p.opts if p.param_type_name == "option"}
        given = next((word for word in args if word in ("--recipe", "-r")), None)
        if given and given not in options and arguments:
            name = (args[args.index(given) + 1 :] or ["NAME_OR_PATH"])[0]
            ctx.fail(f"The recipe is an argument here, say: {ctx.command_path} {name}")
        if "--recipe" not in options or arguments:
            return
        values, spare, _ = self.make_parser(ctx).parse_args(args=list(args))
        missing = "--recipe" if values.get("recipe") is None else "--data"
        if spare and missing in options:
            ctx.fail(
                f"{spare[0]!r} is an argument where an option is wanted, "
                f"say: {ctx.command_path} {missing} {spare[0]}"
            )


class Group(TyperGroup):
    """Commands that are listed by group, each with its whole summary."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the commands first, for they are what is looked for here."""
        self.format_commands(ctx, formatter)
        _write_params(self.get_params(ctx), ctx, formatter)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the commands by group."""
        found = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        names = {one: name for name, one in found if one is not None and not one.hidden}
        width = max(map(len, names.values()), default=0)
        for title, members in _by_group(list(names), "Commands").items():
            with formatter.section(title):
                rows = [(f"{names[one]:{width}}", one.get_short_help_str(1000)) for one in members]
                formatter.write_dl(rows)


class App(typer.Typer):
    """A Typer application whose help is written by the classes of this module."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(cls=Group, rich_markup_mode=None, **settings)

    def command(self, name: str | None = None, **settings: Any) -> Callable[[Any], Any]:
        """Register a command, as in Typer."""
        return super().command(name, **{"cls": Command, **settings})


def _write_params(params: list[Any], ctx: Any, formatter: Any) -> None:
    arguments = [param for param in params if param.param_type_name == "argument"]
    if arguments:
        with formatter.section("Arguments"):
            rows = [(p.metavar or p.name.upper(), p.get_help_record(ctx)[1]) for p in arguments]
            formatter.write_dl(rows)
    options = [p for p in params if p.param_type_name == "option" and not p.hidden]
    for title, members in _by_group(options, "Options").items():
        with formatter.section(title):
            records = [param.get_help_record(ctx) for param in members]
            formatter.write_dl([(_plain(names), text) for names, text in records])


def _by_group(members: list[Any], rest: str) -> dict[str, list[Any]]:
    """Commands or options by the title of their group; those without one last, as `rest`."""
    groups: dict[str, list[Any]] = {}
    for member in members:
        groups.setdefault(getattr(member, "rich_help_panel", None) or rest, []).append(member)
    if rest in groups:
        groups[rest] = groups.pop(rest)
    return groups


def _plain(names: str) -> str:
    """An option's names with `N`, `TEXT` or its choices in the place of Typer's `<int range>`."""

    def name(match: re.Match[str]) -> str:
        kind = match[1].removesuffix(" range")
        return _TYPE_NAMES.get(kind, match[1])

    return re.sub(r"<([^<>]*)>", name, names)
