"""Batch scripts for Slurm: a stage of one run or of several, requeued as long as it gets on."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from denserl_cli.core.system.signals import REQUEUE

WAIT = 300
"""Seconds after the end of one machine's launcher when the others are ended."""
_SCRIPT = """\
#!/bin/bash
{head}
# One task a node starts one process for each of its GPUs. {notice} s before the time limit every
# task is told to write a checkpoint; code {requeue} then puts the job back into the queue, and
# --resume goes on from there. A job that is restarted and writes no checkpoint is not put back.

cd {here} || exit 1
{runs}
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 10000))
checkpoints="$run/checkpoints/{stage}"
newest() {{ find "$checkpoints" -maxdepth 1 -name 'step-*' 2>/dev/null | sort | tail -n 1; }}
before=$(newest)

# --wait: a node that cannot start must not hold the others
srun --cpu-bind=none --wait={wait} bash -c 'exec "$@" --node-rank "$SLURM_NODEID"' denserl \\
    "${{command[@]}}" --out "$run" \\
    --resume --processes {gpus} --nodes "$SLURM_NNODES" --rendezvous "$first:$port"
status=$?

restarts=${{SLURM_RESTART_COUNT:-0}}
if [ "$status" -eq {requeue} ]; then
    if [ "$restarts" -gt 0 ] && [ "$(newest)" = "$before" ]; then
        echo "not requeued: restart $restarts of this job wrote no checkpoint" >&2
{limit}    else
        scontrol requeue "$SLURM_JOB_ID"
    fi
fi
exit "$status"
"""
_LIMIT = """\
    elif [ "$restarts" -ge {limit} ]; then
        echo "not requeued: --requeue-limit {limit} is reached" >&2
"""


@dataclass(frozen=True)
class Job:
    """What a stage asks of the scheduler; None leaves a matter to the cluster.

    gres: asks for the GPUs in place of gpus-per-node. notice: seconds before the time limit when
    the checkpoint is asked for. extra: further options of sbatch, each as one line.
    """

    nodes: int
    gpus: int
    notice: int
    gres: str | None = None
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    dependency: str | None = None
    requeue_limit: int | None = None
    extra: tuple[str, ...] = ()


@dataclass(frozen=True)
class Run:
    """One run of an array: the command without `--out`, and the run folder."""

    words: Sequence[str]
    folder: Path


def script(name: str, stage: str, runs: Sequence[Run], job: Job) -> str:
    """The batch script of a stage; several runs become an array."""
    limit = "" if job.requeue_limit is None else _LIMIT.format(limit=job.requeue_limit)
    return _SCRIPT.format(
        head="".join(f"#SBATCH {line}\n" for line in _head(job_name(name), runs, job)),
        notice=job.notice,
        requeue=REQUEUE,
        here=shlex.quote(str(Path.cwd())),
        runs=_choice(runs),
        stage=stage,
        wait=WAIT,
        gpus=job.gpus,
        limit=limit,
    )


def job_name(name: str) -> str:
    """A name that needs no quotes."""
    return re.sub(r"[^\w.-]", "-", name)


def submit_script(name: str, files: Sequence[Path], *, array: bool) -> str:
    """A shell script that submits stages, each to start when the one before has finished.

    array: each run waits for its own predecessor alone.
    """
    lines = ["#!/bin/bash", f"# Submits the stages of {name}, one after the other.", "set -e"]
    after = ""
    for file in files:
        lines.append(f"job=$(sbatch --parsable {after}{shlex.quote(str(file.absolute()))})")
        lines.append(f'echo "{file.stem}: job $job"')
        kind = "aftercorr" if array else "afterok"
        after = f'--dependency="{kind}:${{job%%;*}}" --kill-on-invalid-dep=yes '
    return "\n".join(lines) + "\n"


def _head(name: str, runs: Sequence[Run], job: Job) -> list[str]:
    gpus = f"--gres={job.gres}" if job.gres else f"--gpus-per-node={job.gpus}"
    lines = [f"--job-name={name}"]
    if len(runs) > 1:
        lines += [f"--output={name}-%A_%a.log", f"--array=0-{len(runs) - 1}"]
    else:
        lines += [f"--output={name}-%j.log"]
    lines += ["--open-mode=append", f"--nodes={job.nodes}", "--ntasks-per-node=1", gpus]
    lines += ["--exclusive"]
    for option in ("time", "partition", "account", "qos", "dependency"):
        if value := getattr(job, option):
            lines.append(f"--{option}={value}")
    return [*lines, f"--signal=USR1@{job.notice}", "--requeue", *job.extra]


def _choice(runs: Sequence[Run]) -> str:
    """Bash that sets `run`, the folder, and `command`."""
    chosen = [f"run={shlex.quote(str(r.folder))} command=({shlex.join(r.words)})" for r in runs]
    if len(runs) == 1:
        return chosen[0]
    cases = [f"    {number}) {one} ;;" for number, one in enumerate(chosen)]
    return "\n".join(['case "$SLURM_ARRAY_TASK_ID" in', *cases, "esac"])
