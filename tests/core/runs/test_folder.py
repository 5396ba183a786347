import json
import os
from pathlib import Path

import pytest
import torch

from denserl_cli.core.errors import DenserlError
from denserl_cli.core.observer import Observer
from denserl_cli.core.recipe import Recipe, load_recipe
from denserl_cli.core.recipe.stages import STAGES, TRAINING
from denserl_cli.core.runs.folder import RunFolder
from tests.fakes import RecordingObserver

STAGE = "train-rm"


def recipe(*settings: str) -> Recipe:
    base = ["reward_model.epochs=2", "optimizer.betas=[0.9, 0.99]"]
    return load_recipe("sandbox-segment", [*base, *settings])


def run_in(folder: Path, *settings: str) -> RunFolder:
    return RunFolder(folder, recipe(*settings))


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return run_in(tmp_path / "run")


@pytest.fixture
def interrupted(run: RunFolder) -> RunFolder:
    """A run with checkpoints and metrics of three steps."""
    run.started(STAGE, "start", Observer())
    for step in (1, 2, 3):
        run.log(STAGE, step, {"loss": step / 10})
        run.save_checkpoint(STAGE, step, {"step": torch.tensor(step)})
    return run


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


# what a folder holds


def test_a_new_folder_is_admitted_and_not_made(run: RunFolder):
    assert run.admit(STAGE, "start") and run.admit(STAGE, "resume") and run.admit(STAGE, "fresh")
    assert not run.path.exists()


def test_an_empty_folder_is_as_good_as_none(tmp_path: Path):
    assert run_in(tmp_path).admit(STAGE, "start")


def test_an_interrupted_stage_asks_what_to_do(interrupted: RunFolder):
    again = run_in(interrupted.path)
    with pytest.raises(DenserlError, match=r"train-rm in .* was interrupted") as caught:
        again.admit(STAGE, "start")
    assert caught.value.hint and {"--resume", "--fresh"} <= set(
        caught.value.hint.replace(",", " ").split()
    )
    assert again.admit(STAGE, "resume") and again.admit(STAGE, "fresh")
    assert again.admit("fit-function", "start")


def test_a_finished_stage_has_nothing_to_do(interrupted: RunFolder):
    interrupted.finished(STAGE, {"accuracy": 0.75})
    again = run_in(interrupted.path)
    assert not again.admit(STAGE, "start") and not again.admit(STAGE, "resume")
    assert again.admit(STAGE, "fresh")
    assert again.summary(STAGE) == {"accuracy": 0.75}
    assert again.summary("train-ppo") is None
    assert not (again.path / "checkpoints" / STAGE).exists()


def test_an_unfinished_stage_has_no_summary(interrupted: RunFolder):
    assert interrupted.summary(STAGE) is None


@pytest.mark.parametrize("finished", [False, True])
def test_a_stage_that_later_work_did_without_needs_fresh(run: RunFolder, finished: bool):
    run.started("train-ppo", "start", Observer())  # with a published reward model
    if finished:
        run.finished("train-ppo", {})
    again = run_in(run.path)
    for stage in ("train-rm", "fit-function"):
        for mode in ("start", "resume"):
            with pytest.raises(DenserlError, match=f"{stage} in .* would replace train-ppo"):
                again.admit(stage, mode)
        assert again.admit(stage, "fresh")


@pytest.mark.parametrize("finished", [False, True])
def test_other_settings_are_named_one_by_one(interrupted: RunFolder, finished: bool):
    if finished:
        interrupted.finished(STAGE, {})
    before = files(interrupted.path)
    changed = run_in(interrupted.path, "reward_model.epochs=3", "optimizer.betas=[0.5, 0.9]")
    for mode in ("start", "resume"):
        with pytest.raises(DenserlError) as caught:
            changed.admit(STAGE, mode)
        assert "reward_model.epochs was 2.0, is 3.0" in caught.value.message
        assert "optimizer.betas was [0.9, 0.99], is [0.5, 0.9]" in caught.value.message
        assert caught.value.hint and "--fresh" in caught.value.hint and "--out" in caught.value.hint
    assert changed.admit(STAGE, "fresh")
    assert files(interrupted.path) == before


def test_settings_that_a_stage_does_not_read_may_change(interrupted: RunFolder):
    changed = run_in(interrupted.path, "ppo.gamma=0.5", "run.keep_checkpoints=9", "description=x")
    assert changed.admit(STAGE, "resume")


def test_what_the_stages_read_are_fields_of_a_recipe():
    for names in (STAGES[name].reads for name in TRAINING):
        for name in names:
            value = recipe()
            for part in name.split("."):
                value = getattr(value, part)


def test_a_folder_of_another_recipe_is_refused(interrupted: RunFolder):
    before = files(interrupted.path)
    with pytest.raises(DenserlError, match="holds a run of recipe sandbox-segment, not of other"):
        run_in(interrupted.path, "name=other")
    assert files(interrupted.path) == before


def test_a_folder_of_something_else_is_refused(tmp_path: Path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(DenserlError, match="not empty and not a denserl run"):
        run_in(tmp_path)
    with pytest.raises(DenserlError, match="not empty and not a denserl run"):
        run_in(tmp_path / "thesis.txt")
    assert files(tmp_path) == {"thesis.txt": b"years of work"}


# one job at a time


def test_a_second_job_is_refused_and_changes_nothing(interrupted: RunFolder):
    other = run_in(interrupted.path)
    with interrupted.locked(Observer()):
        before = files(interrupted.path)
        with pytest.raises(DenserlError, match=f"in use by process {os.getpid()} on"):
            with other.locked(Observer()):
                pytest.fail("two at once")
        assert files(interrupted.path) == before
        with interrupted.locked(Observer()):  # the same job may ask twice
            pass
        assert (interrupted.path / "lock").exists()
    assert not (interrupted.path / "lock").exists()
    with other.locked(Observer()):
        pass


def test_readers_need_no_lock(interrupted: RunFolder):
    with interrupted.locked(Observer()):
        reader = run_in(interrupted.path)
        assert reader.interrupted(STAGE) and len(reader.metrics(STAGE)) == 3


def test_what_another_job_did_meanwhile_is_read_again(run: RunFolder):
    run.claim()
    slow, fast = run_in(run.path), run_in(run.path)
    with fast.locked(Observer()):
        fast.started(STAGE, "start", Observer())
        fast.finished(STAGE, {"accuracy": 1.0})
    assert slow.admit(STAGE, "start")
    with slow.locked(Observer()):
        assert not slow.admit(STAGE, "start")


def test_a_reader_that_claims_a_folder_forgets_no_stage(run: RunFolder):
    run.claim()
    reader, worker = run_in(run.path), run_in(run.path)
    worker.started(STAGE, "start", Observer())
    reader.claim()
    assert run_in(run.path).interrupted(STAGE)


def test_what_killed_jobs_left_is_cleared(interrupted: RunFolder):
    stage = interrupted.path / "checkpoints" / STAGE
    (interrupted.reward_model).mkdir()
    for aside in (interrupted.path, interrupted.reward_model, stage):
        (aside / ".thing.tmp").mkdir()
        (aside / ".run.json.1.tmp").write_text("{")
    (stage / ".step-00000009.old").mkdir()
    with interrupted.locked(Observer()):
        left = {path.name for path in interrupted.path.rglob("*")}
        assert not any(name.endswith((".tmp", ".old")) for name in left)
        assert "step-00000009" in left
    checkpoint = interrupted.latest_checkpoint(STAGE, Observer())
    assert checkpoint is not None and checkpoint.step == 3


def test_a_folder_whose_first_job_died_at_once_is_as_good_as_none(tmp_path: Path):
    for name in ("lock", ".run.json.77.tmp"):
        (tmp_path / name).write_text("{")
    with run_in(tmp_path).locked(Observer()):
        assert not (tmp_path / ".run.json.77.tmp").exists()
    assert list(tmp_path.iterdir()) == []


# starting, resuming, replacing


def test_the_first_thing_kept_is_what_was_asked_for(run: RunFolder):
    assert run.started(STAGE, "start", Observer()) is None
    assert load_recipe(str(run.path / "recipe.yaml")) == run.recipe
    written = json.loads((run.path / "run.json").read_text())
    assert written["recipe"] == "sandbox-segment"
    assert written["stages"][STAGE]["status"] == "interrupted"


def test_resuming_goes_on_from_the_newest_checkpoint(interrupted: RunFolder):
    checkpoint = run_in(interrupted.path).started(STAGE, "resume", Observer())
    assert checkpoint is not None
    assert (checkpoint.step, checkpoint.state["step"].item()) == (3, 3)


def test_resuming_with_nothing_to_resume_starts(run: RunFolder):
    assert run.started(STAGE, "resume", Observer()) is None
    assert run.started(STAGE, "resume", Observer()) is None


def test_the_newest_checkpoints_are_kept(tmp_path: Path):
    for keep in (1, 3):
        run = run_in(tmp_path / str(keep), f"run.keep_checkpoints={keep}")
        for step in (9, 10, 99, 100):
            run.save_checkpoint(STAGE, step, {})
        kept = sorted(path.name for path in (run.path / "checkpoints" / STAGE).iterdir())
        assert kept == [f"step-{step:08d}" for step in (9, 10, 99, 100)[-keep:]]


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 torn", b"no archive at all", None])
def test_a_damaged_checkpoint_is_passed_over(interrupted: RunFolder, damage: bytes | None):
    newest = interrupted.path / "checkpoints" / STAGE / "step-00000003" / "state.pt"
    whole = newest.read_bytes()
    newest.write_bytes(whole[: len(whole) // 2] if damage is None else damage)
    recorder = RecordingObserver()
    checkpoint = interrupted.latest_checkpoint(STAGE, recorder)
    assert checkpoint is not None and checkpoint.step == 2
    assert len(recorder.notices) == 1 and "step-00000003 is damaged" in recorder.notices[0]


def test_a_damaged_checkpoint_does_not_outlive_the_one_that_is_resumed(tmp_path: Path):
    """Kept as the newest, it would push the good ones out."""
    run = run_in(tmp_path / "run", "run.keep_checkpoints=2")
    run.started(STAGE, "start", Observer())
    for step in (4, 6):
        run.save_checkpoint(STAGE, step, {})
    (run.path / "checkpoints" / STAGE / "step-00000006" / "state.pt").write_bytes(b"torn")
    again = run_in(run.path, "run.keep_checkpoints=1")
    resumed = again.started(STAGE, "resume", Observer())
    assert resumed is not None and resumed.step == 4
    again.save_checkpoint(STAGE, 5, {})
    checkpoint = again.latest_checkpoint(STAGE, RecordingObserver())
    assert checkpoint is not None and checkpoint.step == 5


def test_a_checkpoint_of_other_settings_is_refused_before_anything_is_written(
    interrupted: RunFolder, tmp_path: Path
):
    other = run_in(tmp_path / "other", "reward_model.epochs=3")
    other.started(STAGE, "start", Observer())
    checkpoints = other.path / "checkpoints"
    (interrupted.path / "checkpoints").rename(checkpoints)
    before = files(other.path)
    with pytest.raises(DenserlError, match="written under other settings"):
        run_in(other.path, "reward_model.epochs=3").started(STAGE, "resume", Observer())
    assert files(other.path) == before


def test_what_decides_about_memory_alone_may_change(interrupted: RunFolder):
    memory = ("reward_model.micro_batch_size=2", "model.gradient_checkpointing=true")
    changed = run_in(interrupted.path, *memory)
    assert changed.admit(STAGE, "resume")
    checkpoint = changed.started(STAGE, "resume", Observer())
    assert checkpoint is not None and checkpoint.step == 3


def test_a_size_limits_the_checkpoints(tmp_path: Path):
    run = run_in(tmp_path / "run", "run.keep_checkpoints=9", "run.keep_gigabytes=0.00001")
    for step in (1, 2):
        run.save_checkpoint(STAGE, step, {"weights": torch.zeros(5000)})
    kept = [path.name for path in (run.path / "checkpoints" / STAGE).iterdir()]
    assert kept == ["step-00000002"]


def test_lost_checkpoints_mean_a_new_start(interrupted: RunFolder):
    for folder in (interrupted.path / "checkpoints" / STAGE).iterdir():
        (folder / "state.pt").unlink()
    recorder = RecordingObserver()
    assert interrupted.started(STAGE, "resume", recorder) is None
    assert len(recorder.notices) == 3 and "no checkpoint of train-rm" in recorder.notices[-1]
    assert interrupted.metrics(STAGE) == []


def test_lost_lines_are_told(interrupted: RunFolder):
    log, recorder = interrupted.path / "metrics.jsonl", RecordingObserver()
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:1]))
    assert interrupted.started(STAGE, "resume", recorder).step == 3
    assert [notice for notice in recorder.notices if "logged after step 1, up to step 3" in notice]


def test_a_half_written_checkpoint_is_none(interrupted: RunFolder):
    aside = interrupted.path / "checkpoints" / STAGE / ".step-00000004.tmp"
    aside.mkdir()
    (aside / "state.pt").write_bytes(b"half")
    checkpoint = interrupted.latest_checkpoint(STAGE, Observer())
    assert checkpoint is not None and checkpoint.step == 3


def test_metrics_after_the_resumed_checkpoint_are_dropped(interrupted: RunFolder):
    interrupted.log(STAGE, 4, {"loss": 0.4})
    interrupted.log("train-ppo", 9, {"kl": 1.0})
    with (interrupted.path / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "train-rm", "st')
    assert [line["step"] for line in interrupted.metrics(STAGE)] == [1, 2, 3, 4]
    interrupted.started(STAGE, "resume", Observer())
    text = (interrupted.path / "metrics.jsonl").read_text()
    assert [json.loads(line)["step"] for line in text.splitlines()] == [1, 2, 3, 9]
    interrupted.log(STAGE, 4, {"loss": 0.5})
    assert interrupted.metrics(STAGE)[-1] == {"stage": STAGE, "step": 4, "loss": 0.5}


def results(run: RunFolder) -> None:
    """Results of all stages."""
    for stage in TRAINING:
        run.started(stage, "start", Observer())
        run.finished(stage, {})
    for name in ("reward_model/weights", "reward_model/normalizer.json", "policy/weights"):
        (run.path / name).parent.mkdir(exist_ok=True)
        (run.path / name).write_text(name)


def test_a_fresh_start_moves_its_results_and_all_later_ones_aside(run: RunFolder):
    results(run)
    again = run_in(run.path)
    assert again.started(STAGE, "fresh", Observer()) is None
    assert not run.reward_model.exists() and not run.policy.exists()
    replaced = run.path / "replaced"
    assert (replaced / "reward_model.1" / "weights").read_text() == "reward_model/weights"
    assert (replaced / "policy.1" / "weights").read_text() == "policy/weights"
    assert set(json.loads((run.path / "run.json").read_text())["stages"]) == {STAGE}
    results(again)
    run_in(run.path).started(STAGE, "fresh", Observer())
    assert sorted(path.name for path in replaced.iterdir()) == [
        "policy.1", "policy.2", "reward_model.1", "reward_model.2"
    ]  # fmt: skip


def test_a_kill_while_results_are_moved_leaves_no_finished_stage_without(
    run: RunFolder, monkeypatch
):
    results(run)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            run_in(run.path).started(STAGE, "fresh", Observer())
    again = run_in(run.path)
    assert again.interrupted(STAGE) and again.summary("train-ppo") is None
    assert again.started(STAGE, "resume", Observer()) is None
    assert not run.reward_model.exists() and not run.policy.exists()


def test_a_fresh_start_of_a_later_stage_leaves_the_earlier_ones(run: RunFolder):
    results(run)
    again = run_in(run.path)
    again.started("fit-function", "fresh", Observer())
    assert (run.reward_model / "weights").exists() and not run.normalizer.exists()
    moved = run.path / "replaced" / "reward_model" / "normalizer.json.1"
    assert moved.read_text() == "reward_model/normalizer.json"
    assert not again.admit(STAGE, "start") and again.admit("train-ppo", "start")


def test_a_fresh_start_forgets_the_old_checkpoints(interrupted: RunFolder):
    interrupted.started(STAGE, "fresh", Observer())
    assert interrupted.latest_checkpoint(STAGE, Observer()) is None
    assert interrupted.metrics(STAGE) == []


# failing


def test_a_folder_made_for_nothing_is_removed_and_no_other(run: RunFolder):
    run.claim()
    run.abandon()
    assert not run.path.exists()
    run.claim()
    run_in(run.path).abandon()  # it was there before
    assert run.path.exists()


def test_the_folders_above_it_that_were_made_for_nothing_go_along(tmp_path: Path):
    run = run_in(tmp_path / "runs" / "deep" / "run")
    with run.locked(Observer()):
        run.abandon()
    assert list(tmp_path.iterdir()) == []
    run = run_in(tmp_path / "runs" / "deep" / "run")
    with run.locked(Observer()):
        (tmp_path / "runs" / "other").mkdir()
        run.abandon()
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["other"]


def test_a_folder_in_which_a_stage_started_stays(interrupted: RunFolder):
    interrupted.abandon()
    assert interrupted.latest_checkpoint(STAGE, Observer()) is not None
