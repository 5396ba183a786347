"""`denserl slurm`."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import typer

from denserl_cli.commands.common import OutOption, RecipeOption, SetOption, read_recipe
from denserl_cli.core.errors import DenserlError

EXAMPLE = "Example: denserl slurm --recipe sandbox-segment --stage train-rm --to -"

Stage = Literal["train-rm", "fit-function", "train-ppo"]

_TIME = re.compile(r"((?P<days>\d+)-)?(?P<clock>\d+(:\d+){0,2})")
_SCRIPT = """\
#!/bin/bash
#SBATCH --job-name={name}
#SBATCH --output={name}-%j.log
#SBATCH --open-mode=append
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={gpus}
#SBATCH --exclusive
{limits}#SBATCH --signal=USR1@{notice}
#SBATCH --requeue

# One task a node starts one process for each of its GPUs. {notice} s before the time limit every
# task is told to write a checkpoint; code {requeue} then puts the job back into the queue, and
# --resume goes on from there.

cd {here} || exit 1
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 10000))

srun --cpu-bind=none bash -c 'exec "$@" --node-rank "$SLURM_NODEID"' denserl \\
    {command} \\
    --resume --processes {gpus} --nodes "$SLURM_NNODES" --rendezvous "$first:$port"
status=$?

if [ "$status" -eq {requeue} ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
"""


class Job(NamedTuple):
    """What a stage asks of the scheduler."""

    nodes: int
    gpus: int
    notice: int
    time: str | None
    partition: str | None


def slurm(
    recipe: RecipeOption,
    stage: Annotated[Stage, typer.Option(help="What to run.")],
    overrides: SetOption = None,
    out: OutOption = None,
    nodes: Annotated[int, typer.Option(min=1, help="Machines that work together.")] = 1,
    gpus: Annotated[int, typer.Option("--gpus-per-node", min=1, help="GPUs of each.")] = 8,
    time: Annotated[
        str | None, typer.Option(metavar="[D-]HH:MM:SS", help="Time limit; the cluster's without.")
    ] = None,
    partition: Annotated[str | None, typer.Option(help="Partition; the cluster's without.")] = None,
    notice: Annotated[
        int,
        typer.Option(
            min=1,
            max=65_535,  # Slurm's own limit
            metavar="SECONDS",
            help="Checkpoint so long before the limit; exceeds a step.",
        ),
    ] = 120,
    to: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Where to write; - is stdout. NAME-STAGE.sbatch without"),
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Replace an existing file.")] = False,
) -> None:
    """Write a batch script that runs a stage under Slurm and goes on after every time limit."""
    from denserl_cli.core.planning.workload import check_batches
    from denserl_cli.core.system.files import write_text

    loaded = read_recipe(stage, recipe, overrides)
    check_batches(stage, loaded, nodes * gpus)
    _check(time, partition, notice)
    folder = (out or Path("runs") / loaded.name).absolute()
    words = [sys.executable, "-m", "denserl_cli.app", stage, "--recipe", recipe]
    words += ["--out", str(folder), *(w for line in overrides or () for w in ("--set", line))]
    job = Job(nodes, gpus, notice, time, partition)
    text = script(f"{loaded.name}-{stage}", words, job)
    if to == "-":
        typer.echo(text, nl=False)
        return
    file = Path(to or f"{loaded.name}-{stage}.sbatch")
    if file.exists() and not fresh:
        raise DenserlError(f"{file} exists", hint="replace it with --fresh, or name another --to")
    write_text(file, text)
    typer.echo(f"wrote {file}; submit it with: sbatch {shlex.quote(str(file))}")


def script(name: str, words: list[str], job: Job) -> str:
    """The batch script that runs a command line of one stage."""
    from denserl_cli.core.system.signals import REQUEUE

    limits = {"time": job.time, "partition": job.partition}
    return _SCRIPT.format(
        name=re.sub(r"[^\w.-]", "-", name),
        nodes=job.nodes,
        gpus=job.gpus,
        notice=job.notice,
        limits="".join(f"#SBATCH --{key}={value}\n" for key, value in limits.items() if value),
        requeue=REQUEUE,
        here=shlex.quote(str(Path.cwd())),
        command=shlex.join(words),
    )


def _check(time: str | None, partition: str | None, notice: int) -> None:
    if time is not None and _seconds(time) <= notice:
        raise DenserlError(
            f"--time {time} leaves nothing before the checkpoint, {notice} s from its end",
            hint="raise --time, or lower --notice",
        )
    if partition is not None and not re.fullmatch(r"[\w.,-]+", partition):
        raise DenserlError(f"--partition {partition}: no name", hint="see: sinfo")


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
