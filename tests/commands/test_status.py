"""denserl status, on a run at work, stopped, killed and finished."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from denserl_cli.app import app
from denserl_cli.core.errors import DenserlError, Interrupted
from denserl_cli.core.observer import Observer
from denserl_cli.core.stages.run import run_stage
from tests import tiny


def status(*folders: Path) -> list[dict[str, Any]]:
    result = CliRunner().invoke(app, ["status", *map(str, folders), "--json"])
    assert result.exit_code == 0, result.exception
    return json.loads(result.stdout)


class Looks(Observer):
    """Reads the status while the stage works, and stops it after a step."""

    def __init__(self, folder: Path, stop_after: int) -> None:
        self.folder, self.stop_after, self.done = folder, stop_after, 0
        self.seen: list[dict[str, Any]] = []

    def advance(self, count: int = 1, **metrics: float) -> None:
        if "accuracy" in metrics:
            self.done += 1
            self.seen += status(self.folder)
            if self.done == self.stop_after:
                signal.raise_signal(signal.SIGTERM)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Looks]:
    """A train-rm that SIGTERM stopped after step 3."""
    folder = tmp_path_factory.mktemp("status") / "run"
    looks = Looks(folder, stop_after=3)
    with pytest.raises(Interrupted):
        run_stage("train-rm", tiny.recipe("reward_model.save_every=2"), folder, "start", looks)
    return folder, looks


def test_a_run_at_work(stopped: tuple[Path, Looks]):
    _, looks = stopped
    for step, seen in enumerate(looks.seen, 1):
        assert seen["job"]["pid"] == os.getpid() and seen["recipe"] == "sandbox-segment"
        stage = seen["stages"]["train-rm"]
        assert (stage["state"], stage["step"], stage["exit_code"]) == ("running", step, None)
        assert stage["steps"] > 3 and stage["seconds_left"] > 0
        assert stage["metrics"]["loss"] > 0
    assert looks.seen[2]["stages"]["train-rm"]["checkpoints"] == [2]
    assert seen["stages"]["train-ppo"]["state"] == "not started"


def test_a_stopped_run_and_a_killed_one(stopped: tuple[Path, Looks], tmp_path: Path):
    folder = shutil.copytree(stopped[0], tmp_path / "run")
    (found,) = status(folder)
    assert found["job"] is None
    stage = found["stages"]["train-rm"]
    assert (stage["state"], stage["exit_code"], stage["checkpoints"]) == ("interrupted", 75, [2, 3])
    book = json.loads((folder / "run.json").read_text())
    del book["stages"]["train-rm"]["exit_code"]  # as kill -9 leaves it, with its lock's file
    (folder / "run.json").write_text(json.dumps(book))
    (folder / "lock").write_text(json.dumps({"pid": os.getpid(), "host": "h", "since": "now"}))
    with (folder / "metrics.jsonl").open("a") as log:
        log.write('{"stage": "train-rm", "st')
    (found,) = status(folder)
    assert found["job"] is None
    stage = found["stages"]["train-rm"]
    assert (stage["state"], stage["exit_code"], stage["step"]) == ("interrupted", None, 3)


def test_several_runs_as_tables(stopped: tuple[Path, Looks], scored: Path):
    folder = stopped[0]
    assert [one["run"] for one in status(folder, scored)] == [str(folder), str(scored)]
    (found,) = status(scored)
    for name in ("train-rm", "fit-function"):
        stage = found["stages"][name]
        assert (stage["state"], stage["exit_code"], stage["seconds_left"]) == ("finished", 0, None)
    result = CliRunner().invoke(app, ["status", str(folder), str(scored)])
    for words in (f"{folder}, recipe sandbox-segment: no job works on it", "interrupted", "3 of",
                  "2, 3", "75", "finished", "loss 0."):  # fmt: skip
        assert words in result.output


def test_what_is_no_run_is_refused(tmp_path: Path):
    result = CliRunner().invoke(app, ["status", str(tmp_path)])
    assert isinstance(result.exception, DenserlError)
    assert "is not a denserl run" in result.exception.message
