"""Metrics in each tracker's own files, without a network, read back as its program reads them."""

from __future__ import annotations

import json
import math
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from denserl_cli.core.errors import DenserlError
from denserl_cli.core.recipe import Recipe, load_recipe
from denserl_cli.core.runs import trackers
from denserl_cli.core.runs.folder import RunFolder
from denserl_cli.core.runs.trackers import check_trackers, numbers
from denserl_cli.launch.launcher import launch
from tests import ROOT
from tests.fakes import RecordingObserver

RM, PPO = "train-rm", "train-ppo"


def recipe(*names: str) -> Recipe:
    return load_recipe("sandbox-segment", [f"run.trackers=[{','.join(names)}]"])


def work(folder: Path, made: Recipe, stage: str, mode: str, steps: range, fails: bool = False):
    """Log a loss at each step, which tells step and attempt apart; a checkpoint every third."""
    run = RunFolder(folder, made)
    try:
        with run.tracked():
            run.started(stage, mode, RecordingObserver())  # type: ignore[arg-type]
            for step in steps:
                loss = step + (0.5 if mode == "resume" else 0.0)
                run.log(stage, step, {"loss": loss, "bins": [1.0, math.nan], "note": "x"})
                if step % 3 == 0:
                    run.save_checkpoint(stage, step, {})
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass


def tensorboard_losses(folder: Path, stage: str) -> list[tuple[int, float]]:
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="needs tensorboard"
    )
    events = accumulator.EventAccumulator(str(folder / "tensorboard" / stage))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"loss", "bins/0", "bins/1"}
    assert all(math.isnan(event.value) for event in events.Scalars("bins/1"))
    return [(event.step, event.value) for event in events.Scalars("loss")]


def test_tensorboard_goes_on_where_the_checkpoint_is(tmp_path: Path):
    pytest.importorskip("tensorboard", reason="needs tensorboard")
    made = recipe("tensorboard")
    work(tmp_path, made, RM, "start", range(1, 6), fails=True)
    assert tensorboard_losses(tmp_path, RM) == [(step, step) for step in range(1, 6)]
    work(tmp_path, made, RM, "resume", range(4, 8))
    resumed = [(4, 4.5), (5, 5.5), (6, 6.5), (7, 7.5)]
    assert tensorboard_losses(tmp_path, RM) == [(1, 1), (2, 2), (3, 3), *resumed]
    work(tmp_path, made, PPO, "start", range(0, 2))
    assert tensorboard_losses(tmp_path, PPO) == [(0, 0), (1, 1)]
    assert len(tensorboard_losses(tmp_path, RM)) == 7
    work(tmp_path, made, RM, "fresh", range(1, 3))
    assert tensorboard_losses(tmp_path, RM) == [(1, 1), (2, 2)]


def records(file: Path) -> Iterator[Any]:
    """The records of W&B's offline file: a LevelDB log of protocol buffers."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, parts = file.read_bytes(), 7, b""
    while place + 7 <= len(data):
        size, kind = struct.unpack_from("<HB", data, place + 4)
        if kind == 0:  # the rest of a block of 32 KiB
            place = (place // 32768 + 1) * 32768
            continue
        parts += data[place + 7 : place + 7 + size]
        place += 7 + size
        if 32768 - place % 32768 < 7:
            place = (place // 32768 + 1) * 32768
        if kind in (1, 4):  # whole, or the last of several parts
            record = Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def wandb_runs(folder: Path) -> list[dict[str, Any]]:
    """What each offline part holds, in the order in which they were made."""
    found = []
    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        kinds: dict[str, list[Any]] = {"run": [], "history": [], "exit": []}
        for record in records(file):
            kind = record.WhichOneof("record_type")
            if kind in kinds:
                kinds[kind].append(getattr(record, kind))
        lines = [
            {(item.key or item.nested_key[0]): json.loads(item.value_json) for item in line.item}
            for line in kinds["history"]
        ]
        (run,) = {(r.run_id, r.project, r.run_group, r.job_type) for r in kinds["run"]}
        found.append({"run": run, "lines": lines, "exit": kinds["exit"][0].exit_code})
    return found


def test_wandb_goes_on_in_the_same_run_without_a_step_twice(tmp_path: Path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="needs wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    folder = tmp_path / "sandbox"
    made = recipe("wandb")
    work(folder, made, RM, "start", range(1, 6), fails=True)
    work(folder, made, RM, "resume", range(4, 8))
    work(folder, made, PPO, "start", range(0, 2))
    wandb.teardown()  # as at the end of a process: its service writes what it still holds
    # folders are named by the second, which several may share
    in_order = sorted(wandb_runs(folder), key=lambda p: (p["run"][3], p["lines"][0]["_step"]))
    other, first, resumed = in_order  # train-ppo comes before train-rm
    steps = [[line["_step"] for line in part["lines"]] for part in (first, resumed, other)]
    assert steps == [[1, 2, 3, 4, 5], [6, 7], [0, 1]]
    assert [line["loss"] for line in first["lines"] + resumed["lines"]] == [1, 2, 3, 4, 5, 6.5, 7.5]
    assert first["lines"][0].keys() >= {"loss", "bins/0", "bins/1"}
    assert not math.isfinite(float(first["lines"][0]["bins/1"]))
    assert first["run"] == resumed["run"] and first["run"][1:] == ("denserl", "sandbox", RM)
    assert other["run"][0] != first["run"][0] and other["run"][3] == PPO
    assert [part["exit"] for part in (first, resumed, other)] == [1, 0, 0]


LOSSES = [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (5, 5.0), (6, 6.5), (7, 7.5)]


def work_through(folder: Path, made: Recipe) -> None:
    """An interrupted stage, its resumption, and another stage."""
    work(folder, made, RM, "start", range(1, 6), fails=True)
    work(folder, made, RM, "resume", range(4, 8))
    work(folder, made, PPO, "start", range(0, 2))


def test_mlflow_goes_on_in_the_same_run_without_a_step_twice(tmp_path: Path, monkeypatch, capfd):
    pytest.importorskip("mlflow", reason="needs mlflow")
    pytest.importorskip("sqlalchemy", reason="needs mlflow with its database")
    from mlflow import MlflowClient

    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "sandbox"
    work_through(folder, recipe("mlflow"))
    work(folder, recipe("mlflow"), PPO, "fresh", range(0, 1), fails=True)
    client = MlflowClient(f"sqlite:///{folder}/mlflow/mlflow.db")
    experiment = client.get_experiment_by_name("denserl")
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id], order_by=["attributes.start_time"])
    first, other, _ = found
    assert [run.info.run_name for run in found] == [f"sandbox {stage}" for stage in (RM, PPO, PPO)]
    assert [run.info.status for run in found] == ["FINISHED", "FINISHED", "FAILED"]
    history = client.get_metric_history(first.info.run_id, "loss")
    assert [(point.step, point.value) for point in history] == LOSSES
    assert len(client.get_metric_history(other.info.run_id, "loss")) == 2
    assert first.data.params["segmentation.granularity"] == "segment"
    assert {"loss", "bins/0"} <= first.data.metrics.keys()
    assert capfd.readouterr().out == ""


def test_mlflow_that_cannot_be_reached_is_refused(tmp_path: Path, monkeypatch):
    pytest.importorskip("mlflow", reason="needs mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nowhere://x")
    run = RunFolder(tmp_path, recipe("mlflow"))
    with pytest.raises(DenserlError, match="MLflow: ") as caught:
        run.started(RM, "start", RecordingObserver())
    assert caught.value.hint and "MLFLOW_TRACKING_URI" in caught.value.hint


def test_trackio_goes_on_in_the_same_run_without_a_step_twice(tmp_path: Path):
    """In a process of its own: trackio reads where it keeps its data when it is imported."""
    pytest.importorskip("trackio", reason="needs trackio")
    script = """
import sys
from pathlib import Path
from tests.core.runs.test_trackers import recipe, work_through
work_through(Path(sys.argv[1]), recipe("trackio"))
"""
    data = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio")}
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "sandbox")],
        env=data, capture_output=True, text=True, cwd=ROOT, timeout=120,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    script = """
import json
from trackio.sqlite_storage import SQLiteStorage
print(json.dumps({name: SQLiteStorage.get_logs("denserl", name)
                  for name in SQLiteStorage.get_runs("denserl")}))
"""
    shown = subprocess.run(
        [sys.executable, "-c", script], env=data, capture_output=True, text=True, timeout=60
    )
    runs = json.loads(shown.stdout)
    stages = {name.split()[1]: lines for name, lines in runs.items()}
    assert len(runs) == 2 and {name.split()[0] for name in runs} == {"sandbox"}
    assert [(line["step"], line["loss"]) for line in stages[RM]] == LOSSES
    assert [line["step"] for line in stages[PPO]] == [0, 1]
    assert stages[RM][0].keys() >= {"loss", "bins/0", "bins/1"}


def test_wandb_without_a_key_is_refused_before_anything_is_replaced(tmp_path: Path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="needs wandb")

    def refuse(**_: Any) -> None:
        raise wandb.errors.UsageError("No API key configured.")

    work(tmp_path, recipe(), RM, "start", range(1, 3))
    before = (tmp_path / "metrics.jsonl").read_text()
    monkeypatch.setattr(wandb, "init", refuse)
    run = RunFolder(tmp_path, recipe("wandb"))
    with pytest.raises(DenserlError, match="No API key") as caught:
        run.started(RM, "fresh", RecordingObserver())
    assert caught.value.hint and "WANDB_MODE=offline" in caught.value.hint
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_a_tracker_that_is_not_installed_is_named_before_anything_starts(
    tmp_path: Path, monkeypatch
):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    check_trackers(recipe())
    with pytest.raises(DenserlError, match="tensorboard and wandb, which") as caught:
        launch(
            "train-rm",
            recipe("tensorboard", "wandb"),
            out=tmp_path / "run",
            mode="start",
            dry_run=True,
        )
    assert caught.value.exit_code == 2
    assert caught.value.hint and "pip install 'denserl[tensorboard,wandb]'" in caught.value.hint
    assert not (tmp_path / "run").exists()


def test_another_process_has_no_trackers(tmp_path: Path, monkeypatch):
    run = RunFolder(tmp_path, recipe("tensorboard"))
    monkeypatch.setenv("RANK", "1")
    run.started(RM, "start", RecordingObserver())
    run.log(RM, 1, {"loss": 1.0})
    assert not list(tmp_path.iterdir())


def test_numbers_of_every_depth_have_names():
    metrics = {
        "loss": 0.5,
        "by_location": [1, None, math.inf],
        "lengths": [{"pairs": 3, "name": "short"}],
        "done": True,
        "text": "x",
        "nothing": None,
    }
    assert dict(numbers(metrics)) == {
        "loss": 0.5,
        "by_location/0": 1,
        "by_location/2": math.inf,
        "lengths/0/pairs": 3,
        "done": True,
    }


def test_the_observer_hears_what_is_logged_and_what_was_logged_before(tmp_path: Path):
    class Listener(RecordingObserver):
        def __init__(self) -> None:
            super().__init__()
            self.heard: list[tuple[int, Any]] = []

        def metrics(self, step: int, metrics: Any) -> None:
            self.heard.append((step, metrics["loss"]))

        def sample(self, step: int, sample: Any) -> None:
            self.heard.append((step, sample["prompt"]))

    run, recorder = RunFolder(tmp_path, recipe()), Listener()
    run.started(RM, "start", recorder)
    for step in (1, 2, 3):
        run.log(RM, step, {"loss": math.nan if step == 1 else step / 2})
    run.log(RM, 2, {"prompt": "hi"}, file="samples.jsonl")
    assert recorder.heard == [(1, None), (2, 1.0), (3, 1.5), (2, "hi")]
    run.save_checkpoint(RM, 2, {})
    again = Listener()
    RunFolder(tmp_path, recipe()).started(RM, "resume", again)
    assert again.heard == [(1, None), (2, 1.0), (2, "hi")]


class Broken:
    """A tracker whose service has gone."""

    name = "wandb"

    def log(self, *_: Any, **__: Any) -> None:
        raise ConnectionResetError("Connection lost")

    @property
    def tracker(self) -> Any:
        raise ConnectionResetError("Connection lost")

    def finish(self) -> None:
        raise ConnectionResetError("Connection lost")


def test_a_tracker_that_fails_stops_nothing(tmp_path: Path):
    run, recorder = RunFolder(tmp_path, recipe()), RecordingObserver()
    with pytest.raises(KeyboardInterrupt), run.tracked():
        run.started(RM, "start", recorder)
        made = run.logs._trackers
        assert made is not None
        made._open = [(-1, Broken())]  # type: ignore[list-item]
        run.log(RM, 1, {"loss": 0.5})
        assert made._open == []
        made._open = [(-1, Broken())]  # type: ignore[list-item]
        raise KeyboardInterrupt
    assert [line["loss"] for line in run.metrics(RM)] == [0.5]
    assert sum("wandb failed" in heard for heard in recorder.notices) == 2


def test_a_torn_character_is_passed_over(tmp_path: Path):
    run = RunFolder(tmp_path, recipe())
    run.started(RM, "start", RecordingObserver())  # type: ignore[arg-type]
    run.log(RM, 1, {"prompt": "雪"}, file="samples.jsonl")
    file = tmp_path / "samples.jsonl"
    file.write_bytes(file.read_bytes() * 2)
    file.write_bytes(file.read_bytes()[:-4])  # inside the last character
    assert [line["prompt"] for line in run.logs.lines("samples.jsonl")] == ["雪"]
