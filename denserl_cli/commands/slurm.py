"""`denserl slurm`."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from denserl_cli.commands.common import OutOption, SetOption, read_recipe
from denserl_cli.commands.completion import complete_recipe
from denserl_cli.commands.help import RECIPE
from denserl_cli.core.errors import DenserlError

if TYPE_CHECKING:
    from denserl_cli.launch.slurm import Job, Run

EXAMPLE = "Example: denserl slurm --recipe sandbox-segment --stage train-rm --to -"

Stage = Literal["train-rm", "fit-function", "train-ppo", "all"]

_STAGES = ("train-rm", "fit-function", "train-ppo")
_TIME = re.compile(r"((?P<days>\d+)-)?(?P<clock>\d+(:\d+){0,2})")
_RANGE = re.compile(r"(\d+)(?:-(\d+))?")
_GRES = re.compile(r"gpu(:[A-Za-z][\w.-]*)?(:(?P<count>[1-9]\d*))?")


def slurm(
    stage: Annotated[
        Stage, typer.Option(help="What to run; all: each when the one before is finished.")
    ],
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            "-r",
            metavar="NAME_OR_PATH",
            help="Shipped recipe or YAML file; --array may name several instead.",
            autocompletion=complete_recipe,
            rich_help_panel=RECIPE,
        ),
    ] = None,
    overrides: SetOption = None,
    out: OutOption = None,
    nodes: Annotated[int, typer.Option(min=1, help="Machines that work together.")] = 1,
    gpus: Annotated[
        int | None, typer.Option("--gpus-per-node", min=1, help="GPUs of each; 8 without it.")
    ] = None,
    gres: Annotated[
        str | None,
        typer.Option(metavar="gpu[:TYPE][:N]", help="Ask for the GPUs by --gres instead."),
    ] = None,
    time: Annotated[
        str | None, typer.Option(metavar="[D-]HH:MM:SS", help="Time limit; the cluster's without.")
    ] = None,
    partition: Annotated[str | None, typer.Option(help="Partition; the cluster's without.")] = None,
    account: Annotated[str | None, typer.Option(help="Account to charge.")] = None,
    qos: Annotated[str | None, typer.Option(help="Quality of service.")] = None,
    dependency: Annotated[
        str | None,
        typer.Option(metavar="afterok:JOB", help="What to wait for, as sbatch takes it."),
    ] = None,
    array: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="Several runs, one folder each: seeds (1-3 or 1,5) or recipes (a,b).",
        ),
    ] = None,
    notice: Annotated[
        int,
        typer.Option(
            min=1,
            max=65_535,  # Slurm's own limit
            metavar="SECONDS",
            help="Checkpoint so long before the limit; exceeds a step.",
        ),
    ] = 120,
    requeue_limit: Annotated[
        int | None,
        typer.Option(min=0, metavar="N", help="Put the job back into the queue at most so often."),
    ] = None,
    sbatch: Annotated[
        list[str] | None,
        typer.Option(metavar="OPTION", help="A further #SBATCH line, as --mem=0; repeatable."),
    ] = None,
    to: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Where to write; - is stdout. NAME-STAGE.sbatch without"),
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Replace existing files.")] = False,
) -> None:
    """Write a batch script that runs a stage under Slurm and goes on after every time limit."""
    from denserl_cli.launch.slurm import Job, script

    count, extra = _gpus(gpus, gres), tuple(sbatch or ())
    job = Job(nodes, count, notice, gres, time, partition, account, qos, dependency, requeue_limit,
              extra)  # fmt: skip
    _check(job)
    texts: dict[str, str] = {}
    for one in _STAGES if stage == "all" else (stage,):
        name, runs = _runs(one, recipe, array, overrides, out, nodes * count)
        first = job if not texts else replace(job, dependency=None)  # the submit script has theirs
        texts[one] = script(f"{name}-{one}", one, runs, first)
    if to == "-":
        if len(texts) > 1:
            raise DenserlError("--to - prints one script", hint="name a --stage, or a --to FILE")
        typer.echo(texts[stage], nl=False)
        return
    for line in _write(name, texts, to, array=len(runs) > 1, fresh=fresh):
        typer.echo(line)


def _runs(
    stage: str,
    recipe: str | None,
    array: str | None,
    overrides: Sequence[str] | None,
    out: Path | None,
    ranks: int,
) -> tuple[str, list[Run]]:
    """What to call the job, and its runs: one, or those that --array names."""
    from denserl_cli.core.planning.workload import check_batches
    from denserl_cli.launch.slurm import Run

    seeds, recipes = _array(array, recipe)
    runs, names = [], []
    for path, seed in [(path, seed) for path in recipes for seed in seeds]:
        own = [*(overrides or ()), *([f"seed={seed}"] if seed is not None else [])]
        loaded = read_recipe(stage, path, own)
        check_batches(stage, loaded, ranks)
        folder = out or Path("runs") / (loaded.name if len(recipes) == 1 else "")
        folder /= loaded.name if len(recipes) > 1 else ""
        folder /= f"seed-{seed}" if seed is not None else ""
        words = [sys.executable, "-m", "denserl_cli.app", stage, "--recipe", path]
        runs.append(Run([*words, *(w for s in own for w in ("--set", s))], folder.absolute()))
        names.append(loaded.name)
    if len({run.folder for run in runs}) < len(runs):
        raise DenserlError(
            f"--array {array}: two recipes are called {max(names, key=names.count)}",
            hint="give each recipe a name of its own: the runs need a folder each",
        )
    return (names[0] if len(recipes) == 1 else "array"), runs


def _array(array: str | None, recipe: str | None) -> tuple[list[int | None], list[str]]:
    """The seeds and the recipes of --array; without it the recipe's own seed."""
    parts = [part.strip() for part in array.split(",")] if array is not None else []
    ranges = [_RANGE.fullmatch(part) for part in parts]
    if array is None or all(ranges):
        if recipe is None:
            raise DenserlError("no recipe", hint="name one with --recipe NAME_OR_PATH")
        bounds = [(int(r[1]), int(r[2] or r[1])) for r in ranges if r]
        seeds = [seed for low, high in bounds for seed in range(low, high + 1)]
        if array is not None and (not seeds or len(set(seeds)) < len(seeds)):
            raise DenserlError(f"--array {array}: no list of seeds", hint="write 1-3 or 1,5")
        return list(seeds) or [None], [recipe]
    if recipe is not None:
        raise DenserlError("--array names recipes, and so does --recipe", hint="leave out one")
    return [None], parts


def _write(
    name: str, texts: Mapping[str, str], to: str | None, *, array: bool, fresh: bool
) -> list[str]:
    """Write the scripts, and for several the one that submits them; returns what to say."""
    from denserl_cli.core.system.files import write_text
    from denserl_cli.launch.slurm import job_name, submit_script

    name = job_name(name)
    if len(texts) == 1:
        ((stage, text),) = texts.items()
        submit = Path(to or f"{name}-{stage}.sbatch")
        files = {submit: text}
        run = "sbatch"
    else:
        submit = Path(to or f"{name}-all.sh")
        files = {submit.with_name(f"{name}-{stage}.sbatch"): t for stage, t in texts.items()}
        files[submit] = submit_script(name, list(files), array=array)
        run = "bash"
    taken = [str(file) for file in files if file.exists()]
    if taken and not fresh:
        exist = "exists" if len(taken) == 1 else "exist"
        raise DenserlError(
            f"{', '.join(taken)} {exist}", hint="replace with --fresh, or name another --to"
        )
    for file, text in files.items():
        write_text(file, text)
    named = [*map(str, files)]
    return [f"wrote {', '.join(named)}; submit it with: {run} {shlex.quote(str(submit))}"]


def _gpus(gpus: int | None, gres: str | None) -> int:
    """GPUs of each machine."""
    if gres is None:
        return gpus or 8
    found = _GRES.fullmatch(gres)
    if found is None:
        raise DenserlError(f"--gres {gres}: no GPUs", hint="write gpu:N or gpu:TYPE:N")
    count = int(found["count"] or 1)
    if gpus not in (None, count):
        raise DenserlError(f"--gres {gres} and --gpus-per-node {gpus}", hint="leave out one")
    return count


def _check(job: Job) -> None:
    if job.time is not None and _seconds(job.time) <= job.notice:
        raise DenserlError(
            f"--time {job.time} leaves nothing before the checkpoint, {job.notice} s from its end",
            hint="raise --time, or lower --notice",
        )
    for option, command in (("partition", "sinfo"), ("account", "sacctmgr show account"),
                            ("qos", "sacctmgr show qos")):  # fmt: skip
        value = getattr(job, option)
        if value is not None and not re.fullmatch(r"[\w.,-]+", value):
            raise DenserlError(f"--{option} {value}: no name", hint=f"see: {command}")
    if job.dependency is not None and not re.fullmatch(r"[\w:,?+-]+", job.dependency):
        raise DenserlError(
            f"--dependency {job.dependency}: no dependency", hint="write afterok:JOB"
        )
    for line in job.extra:
        if not re.fullmatch(r"-[^\n]*", line):
            raise DenserlError(f"--sbatch {line!r}: no option", hint="write it as --sbatch=--mem=0")


def _seconds(time: str) -> int:
    """A time limit as Slurm reads it: M, M:S or H:M:S; with days D-H, D-H:M or D-H:M:S."""
    found = _TIME.fullmatch(time)
    if found is None:
        raise DenserlError(f"--time {time}: no time limit", hint="write HH:MM:SS or D-HH:MM:SS")
    numbers = [int(number) for number in found["clock"].split(":")]
    if found["days"] is None and len(numbers) < 3:
        numbers.insert(0, 0)  # the first one is minutes
    hours, minutes, seconds = [*numbers, 0, 0][:3]
    return ((int(found["days"] or 0) * 24 + hours) * 60 + minutes) * 60 + seconds
