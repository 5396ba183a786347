"""Run folders as they are found, whole or not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from denserl_cli.core.errors import DenserlError
from denserl_cli.core.normalizer import LocationNormalizer
from denserl_cli.core.reporting.locations import pool
from denserl_cli.core.reporting.record import Series, is_number, read_run, read_runs
from denserl_cli.core.reporting.report import missing
from tests.core.reporting.conftest import PPO, RM, lines, write_run


def test_a_whole_run_is_read(run_folder: Path):
    run = read_run(run_folder, "it")
    assert run.notes == [] and missing(run) == []
    assert run.setting("ppo.kl_coef") == 0.02 and run.setting("ppo.no.such") is None
    assert run.stages[PPO].finished and run.stages[PPO].processes == 2
    assert [line["step"] for line in run.metrics[PPO]] == list(range(13))
    assert run.series(PPO, "eval_rm_score").values.tolist() == [0.5, 2.0]
    assert [one["pairs"] for one in run.accuracy_by_length] == [40, 5, 55]
    assert run.normalizer is not None and len(run.measured) == 3


def test_early_and_late_are_fifths():
    series = Series(np.arange(10.0), np.arange(10.0))
    assert (series.early, series.late) == (0.5, 8.5)
    assert not Series(np.zeros(0), np.zeros(0))


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe\x00", b'{"stage": "train-ppo", "st', b"[]\n3\n"]
)
def test_a_damaged_metrics_file_is_a_note(run_folder: Path, content: bytes):
    (run_folder / "metrics.jsonl").write_bytes(content)
    (run_folder / "samples.jsonl").write_bytes(content)
    (run_folder / "recipe.yaml").write_bytes(b"a: [")
    (run_folder / "reward_model" / "normalizer.json").write_bytes(content)
    run = read_run(run_folder, "it")
    said = " ".join(missing(run))
    for name in ("metrics.jsonl", "samples.jsonl", "recipe.yaml", "normalizer.json"):
        assert name in said
    assert "no metrics yet" in said


def test_one_torn_line_costs_that_line(run_folder: Path):
    with (run_folder / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "train-ppo", "step": 13, "kl": 1')
    run = read_run(run_folder, "it")
    assert run.notes == ["metrics.jsonl: 1 lines could not be read and are left out"]
    assert len(run.metrics[PPO]) == 13


def test_an_older_run_says_what_it_did_not_record(run_folder: Path):
    book = json.loads((run_folder / "run.json").read_text())
    book["stages"] = {name: {"status": "finished", "settings": {}} for name in book["stages"]}
    (run_folder / "run.json").write_text(json.dumps(book))
    kept = ("stage", "step", "kl", "rm_score", "loss", "eval_accuracy", "eval_rm_score")
    old = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    (run_folder / "metrics.jsonl").write_text(
        "".join(json.dumps({k: v for k, v in line.items() if k in kept}) + "\n" for line in old)
    )
    said = missing(read_run(run_folder, "it"))
    for words in ("policy entropy", "clipped rewards", "by location", "length difference",
                  "library versions"):  # fmt: skip
        assert any(words in line for line in said), words


def test_evaluate_rm_makes_up_for_missing_bins(run_folder: Path):
    (run_folder / "metrics.jsonl").write_text("")
    bins = [{"shortest": 1, "longest": None, "pairs": 3, "accuracy": 0.5}]
    (run_folder / "evaluation").mkdir()
    (run_folder / "evaluation" / "rm-a.json").write_text("{")
    (run_folder / "evaluation" / "rm-b.json").write_text(json.dumps({"length": {"bins": bins}}))
    assert read_run(run_folder, "it").accuracy_by_length == bins


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path):
    with pytest.raises(DenserlError, match="is not a denserl run"):
        read_runs([tmp_path])
    with pytest.raises(DenserlError, match="is not a folder"):
        read_runs([tmp_path / "none"])
    for content in ("", "[]", '{"recipe": 3, "stages": {}}', '{"recipe": "a", "stages": []}'):
        (tmp_path / "run.json").write_text(content)
        with pytest.raises(DenserlError, match=r"run\.json is damaged"):
            read_runs([tmp_path])


def test_runs_get_the_shortest_names_that_tell_them_apart(tmp_path: Path):
    for name in ("a/one", "b/one", "two"):
        write_run(tmp_path / name, iterations=1)
    assert [run.label for run in read_runs([tmp_path / "a/one", tmp_path / "two"])] == [
        "one",
        "two",
    ]
    folders = [tmp_path / "a/one", tmp_path / "b/one"]
    assert [run.label for run in read_runs(folders)] == ["a/one", "b/one"]
    with pytest.raises(DenserlError, match="named twice"):
        read_runs([tmp_path / "two", tmp_path / "a" / ".." / "two"])


def test_a_link_to_itself_is_no_folder(tmp_path: Path):
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    with pytest.raises(DenserlError, match="is not a folder"):
        read_runs([loop, write_run(tmp_path / "run", iterations=1)])


def test_numbers_without_bounds_are_left_out(run_folder: Path):
    odd = [json.dumps({"stage": PPO, "step": 13, "kl": kl}) for kl in (10**400, 1e308)]
    odd.append(json.dumps({"stage": PPO, "step": 10**400, "kl": 1.0}))
    with (run_folder / "metrics.jsonl").open("a") as file:
        file.write("\n".join(odd))
    run = read_run(run_folder, "it")
    assert run.series(PPO, "kl").values.max() == 22
    assert run.notes == ["metrics.jsonl: 1 lines could not be read and are left out"]
    LocationNormalizer(0.0, 0.0, 1e308, 1.0).save(run_folder / "reward_model" / "normalizer.json")
    assert read_run(run_folder, "it").normalizer is None
    assert not is_number(-1e308) and is_number(1e299) and is_number(0)


def test_a_run_that_has_only_begun(tmp_path: Path):
    folder = write_run(tmp_path / "run")
    shutil.rmtree(folder / "reward_model")
    (folder / "run.json").write_text('{"recipe": "x", "stages": {}}')
    assert "no stage has been started" in missing(read_run(folder, "it"))


def test_locations_are_pooled_over_iterations():
    found = pool(
        lines(
            PPO,
            location_segments=[[1, 0], [3, 0]],
            location_value_mean=[[0.0, None], [4.0, None]],
            location_value_std=[[0.0, None], [2.0, None]],
        ),
        "value",
    )
    assert found is not None
    assert found.segments.tolist() == [4, 0] and found.mean[0] == 3
    assert found.std[0] == pytest.approx(np.sqrt((0 + 3 * (4 + 16)) / 4 - 9))
    assert found.whole == pytest.approx((3, found.std[0]))
    for odd in ("x", [10**400]):
        assert pool(lines(RM, location_segments=[[1], odd, None]), "value") is None
        columns = {f"location_{name}": [odd] for name in ("segments", "value_mean", "value_std")}
        assert pool(lines(RM, **columns), "value") is None
