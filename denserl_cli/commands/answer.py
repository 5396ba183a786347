"""`denserl answer`."""

from __future__ import annotations

import math
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from denserl_cli.commands.common import (
    DryRunOption,
    OutOption,
    RecipeOption,
    ResumeOption,
    SetOption,
    read_mode,
)
from denserl_cli.core.errors import DenserlError

if TYPE_CHECKING:
    from denserl_cli.core.answers.job import Job

EXAMPLE = "Example: denserl answer -r phi3-segment -b mt-bench --questions mt.jsonl"


class Name(StrEnum):
    """The benchmarks."""

    ALPACA_EVAL = "alpaca-eval"
    ARENA_HARD = "arena-hard"
    ARENA_HARD_V2 = "arena-hard-v2"
    MT_BENCH = "mt-bench"


def answer(
    recipe: RecipeOption,
    benchmark: Annotated[Name, typer.Option("--benchmark", "-b", help="Whose questions they are.")],
    questions: Annotated[
        Path, typer.Option("--questions", metavar="FILE", help="The benchmark's question file.")
    ],
    overrides: SetOption = None,
    out: OutOption = None,
    to: Annotated[
        Path | None,
        typer.Option(
            "--to", metavar="FILE", help="Answers file; RUN/answers/BENCHMARK/GENERATOR without it."
        ),
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option(
            "--policy",
            metavar="PATH_OR_HUB_NAME",
            help="Policy; without it the run's, else the published one; `start`: the start model.",
        ),
    ] = None,
    generator: Annotated[
        str | None,
        typer.Option(
            "--generator",
            metavar="NAME",
            help="What the judge calls it; without it the recipe and a short hash of the policy.",
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Answer the first questions only.")
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-new-tokens", min=1, help="Longest answer; the benchmark's own without it."
        ),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(
            "--temperature", min=0, help="For all questions; the benchmark's own without it."
        ),
    ] = None,
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, help="Questions answered together.")
    ] = 16,
    resume: ResumeOption = None,
    dry_run: DryRunOption = False,
) -> None:
    """Answer a benchmark's questions in the format that its judge reads."""
    from denserl_cli.core.answers.formats import BENCHMARKS
    from denserl_cli.core.answers.job import Job
    from denserl_cli.core.answers.questions import read_questions
    from denserl_cli.core.recipe import load_recipe
    from denserl_cli.core.runs.folder import RunFolder
    from denserl_cli.core.runs.policies import choose_policy
    from denserl_cli.terminal.dashboard import make_observer

    loaded = load_recipe(recipe, overrides or ())
    folder = out or Path("runs") / loaded.name
    run = RunFolder(folder, loaded)
    asked = BENCHMARKS[benchmark.value]
    _check(to, questions, temperature)
    chosen = choose_policy(loaded, run, policy)
    if policy is None:
        run.check_settings("train-ppo", ("sandbox", "model", "lora", "chat"))
    job = Job(
        benchmark=asked,
        questions=read_questions(questions, asked)[:limit],
        policy=chosen.path,
        generator=generator or "",
        target=to or folder,
        max_new_tokens=max_new_tokens or asked.max_new_tokens,
        batch_size=batch_size,
        temperature=temperature,
    )
    if generator is None:  # a name that was judged before keeps its old score
        generator = f"{chosen.name}-{job.fingerprint(loaded)}"
    name = _checked(generator)
    target = to or folder / "answers" / asked.name / f"{name}{asked.suffix}"
    job = replace(job, generator=name, target=target)
    if dry_run:
        typer.echo(_plan(job))
        return
    from denserl_cli.core.answers.generate import answer as write
    from denserl_cli.core.stages.run import quiet_libraries

    quiet_libraries()
    with make_observer() as observer:
        if chosen.notice:
            observer.notice(chosen.notice)
        if write(loaded, run, job, read_mode(resume), observer):
            typer.echo(f"{len(job.questions)} answers of {name} are in {job.target}")
        else:
            observer.notice(
                f"the answers in {job.target} are finished; nothing to do (--fresh does them again)"
            )


def _checked(name: str) -> str:
    """A generator's name; the judges make file names of it."""
    if not name.strip() or name.startswith(".") or not name.isprintable() or set(name) & set("/\\"):
        raise DenserlError(
            f"--generator {name!r}: no name for a file",
            hint="give a name without slashes that does not begin with a dot",
        )
    return name


def _check(to: Path | None, questions: Path, temperature: float | None) -> None:
    if to is not None and to.resolve() == questions.resolve():
        raise DenserlError(f"--to {to} is the question file", hint="name another file")
    if temperature is not None and not math.isfinite(temperature):
        raise DenserlError(f"--temperature {temperature}: not a number", hint="0 is greedy")


def _plan(job: Job) -> str:
    policy = job.policy or "the start model"
    return (
        f"would answer {len(job.questions)} questions of {job.benchmark.name} with {policy}, "
        f"up to {job.max_new_tokens} tokens each turn, as {job.generator}, into {job.target}"
    )
