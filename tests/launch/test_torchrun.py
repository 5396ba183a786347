"""Several processes train what one process trains, and survive what it survives."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.equality import (
    EVALUATIONS,
    GROUPS,
    PLAIN,
    STAGES,
    TOLERANCE,
    TWO,
    Case,
    compare,
    distance,
    make_task,
    read_lines,
    run_jobs,
    work,
)
from denserl_cli.core.engine.deepspeed_engine import DeepSpeedEngine
from denserl_cli.core.errors import DenserlError
from tests import ROOT

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")

TRACKED = ("run.trackers=[tensorboard]",) if find_spec("tensorboard") else ()
BANDIT = (*GROUPS["bandit"].settings, *GROUPS["critic from the reward model"].settings, *TRACKED)
HALF = ("model.dtype=bfloat16", "normalizer.kind=none")
OWN = ("ppo.rewards=python:tests.reward_functions.variety",)
SOURCES = ("ppo.rewards=[differences, attention, {source: log_ratio, model: SECOND}]",)
PARTS = ("ppo.rewards=[shapley, values]",)
CASES = (
    *TWO,
    Case("bandit", 3, 2, BANDIT),
    Case("LoRA", 2, 2, GROUPS["LoRA"].settings),
    Case("own reward", 2, 2, OWN),
    Case("sources, sharded", 3, 2, SOURCES),
    Case("sources of parts", 2, 2, PARTS),
)
HALVES = tuple(Case(f"bfloat16 {stage}", stage, 2, HALF) for stage in (1, 2, 3))
PLAINS = (PLAIN, *(Case(f"torch {c.name}", 0, 1, c.settings) for c in CASES if c.settings))


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The settings of every run: a tiny task in which little divides."""
    made = make_task(tmp_path_factory.mktemp("task") / "task")
    shutil.copytree(model_of(made), model_of(made).with_name("second"))
    return made


def model_of(task: list[str]) -> Path:
    """The folder of the starting model."""
    return Path(next(one for one in task if one.startswith("model.path=")).partition("=")[2])


def settings_of(task: list[str], case: Case) -> list[str]:
    """The settings of a case, with the folder of its second policy."""
    second = str(model_of(task).with_name("second"))
    return [setting.replace("SECOND", second) for setting in (*task, *case.overrides())]


@pytest.fixture(scope="module")
def runs(task: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders of all cases, made in one launch of two processes and in this one."""
    out = tmp_path_factory.mktemp("equality")
    jobs = [
        (stage, str(out / case.name), settings_of(task, case))
        for case in (*PLAINS, *CASES, *HALVES)
        for stage in STAGES
        if stage != "fit-function" or case not in HALVES
    ]
    plain = [job for job in jobs if Path(job[1]).name.startswith("torch")]
    work(plain)
    alone, together = out / PLAIN.name, out / "evaluated"
    shutil.copytree(alone, together)
    work([(stage, str(alone), task) for stage in EVALUATIONS])
    jobs += [(stage, str(together), [*task, *TWO[2].overrides()]) for stage in EVALUATIONS]
    run_jobs([job for job in jobs if job not in plain], processes=2)
    return out


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_two_processes_train_what_one_trains(case: Case, runs: Path):
    plain = runs / (f"torch {case.name}" if case.settings else PLAIN.name)
    found = compare(plain, runs / case.name)
    assert found.small, found


@pytest.mark.parametrize(
    ("name", "own"), [("rm-pairs", ["reward_model"]), ("policy", ["reward_model", "policy"])]
)
def test_two_processes_evaluate_as_one_does(name: str, own: list[str], runs: Path):
    folders = (runs / PLAIN.name, runs / "evaluated")
    one, two = (json.loads((f / "evaluation" / f"{name}.json").read_text()) for f in folders)
    for path in own:
        assert Path(one.pop(path)).parent == folders[0] and two.pop(path).startswith(str(runs))
    assert distance(one, two) < TOLERANCE
    if name == "policy":
        lines = [read_lines(f / "evaluation" / "policy-samples.jsonl") for f in folders]
        assert distance(*lines) < TOLERANCE


@pytest.mark.parametrize("case", HALVES, ids=lambda case: case.name)
def test_half_precision_trains(case: Case, runs: Path):
    exact, half = (
        [line for line in read_lines(runs / name / "metrics.jsonl") if "loss" in line]
        for name in (PLAIN.name, case.name)
    )
    assert [line["loss"] for line in half] == pytest.approx([line["loss"] for line in exact], 0.05)
    ppo = [line for line in read_lines(runs / case.name / "metrics.jsonl") if line not in half]
    assert len(ppo) == 4 and all(math.isfinite(line["policy_loss"]) for line in ppo[1:])


@pytest.mark.skipif(not TRACKED, reason="needs tensorboard")
@pytest.mark.parametrize("stage", ["train-rm", "train-ppo"])
def test_one_process_of_several_writes(stage: str, runs: Path):
    assert len(list((runs / "bandit" / "tensorboard" / stage).glob("events*"))) == 1
    lines = read_lines(runs / "bandit" / "metrics.jsonl")
    steps = [line["step"] for line in lines if line["stage"] == stage]
    assert steps and steps == sorted(set(steps))


class Job:
    """train-rm in two processes under ZeRO 3, as a user starts it."""

    def __init__(self, task: list[str], folder: Path, *words: str) -> None:
        case = TWO[2]
        settings = [*task, *case.overrides(), "reward_model.save_every=1"]
        sets = [word for setting in settings for word in ("--set", setting)]
        line = ["-m", "denserl_cli.app", "train-rm", "-r", "sandbox-segment", "--processes", "2"]
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, *line, *sets, "--out", str(folder), *words],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )

    def steps(self) -> int:
        """Steps that have been logged."""
        file = self.folder / "metrics.jsonl"
        return file.read_text().count("\n") if file.exists() else 0

    def signal(self, number: int, after: int) -> None:
        """Send a signal to the launcher when so many steps have been logged."""
        while self.steps() < after and self.process.poll() is None:
            time.sleep(0.01)
        self.process.send_signal(number)

    def end(self) -> tuple[int, str]:
        """Exit code and stderr; stderr ends when the last process that holds it has ended."""
        _, errors = self.process.communicate(timeout=120)
        return self.process.returncode, errors


def test_a_job_survives_a_scheduler_a_kill_and_a_damaged_shard(
    runs: Path, task: list[str], tmp_path: Path
):
    folder = tmp_path / "run"
    job = Job(task, folder)
    job.signal(signal.SIGTERM, after=2)
    code, errors = job.end()
    assert code == 75 and errors.count("error: stopped after step") <= 1 and "--resume" in errors
    job = Job(task, folder, "--resume")
    job.signal(signal.SIGKILL, after=job.steps() + 3)
    assert job.end()[0] == -9  # and no process of the job holds its stderr any more
    newest = max((folder / "checkpoints" / "train-rm").glob("step-*"))
    shard = sorted(newest.rglob("*optim_states.pt"))[-1]
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    code, errors = Job(task, folder, "--resume").end()
    assert code == 0 and f"{newest} is damaged" in errors and "resuming after step" in errors
    weights = Path("reward_model") / "model.safetensors"
    assert (folder / weights).read_bytes() == (runs / TWO[2].name / weights).read_bytes()


def test_shards_of_another_job_are_refused():
    now = SimpleNamespace(state=lambda: {"processes": 2, "zero_stage": 3})
    for processes in (2, 4):
        DeepSpeedEngine.restore(now, {"processes": processes, "zero_stage": 3})
        assert now.regroup is (processes == 4)
    with pytest.raises(DenserlError, match="of ZeRO 2, this job's engine is of ZeRO 3"):
        DeepSpeedEngine.restore(now, {"processes": 2, "zero_stage": 2})
    with pytest.raises(DenserlError, match="of one process without DeepSpeed, this job has 2"):
        DeepSpeedEngine.restore(now, {"model": {}, "optimizer": {}, "schedule": {}})
