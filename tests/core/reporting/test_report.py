"""What is on the page: plots that read in light and dark, samples, tables."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree
from pathlib import Path

import pytest

from denserl_cli.core.reporting.drawing import Plot, css, drawing
from denserl_cli.core.reporting.record import RunRecord, read_runs
from denserl_cli.core.reporting.report import Report, make_report, missing, versions
from denserl_cli.core.reporting.samples import threads
from tests.core.reporting.conftest import PPO, MakeRecord, lines, write_lines, write_run


def report(*folders: Path) -> Report:
    return make_report(read_runs(folders))


def test_a_run_fills_every_section(run_folder: Path):
    made = report(run_folder)
    assert [section.title for section in made.sections] == [
        "Reward model",
        "Normaliser",
        "Policy",
        "Reward against KL",
        "Length drift",
        "Reward by location",
    ]
    overview = {row[0]: row[1] for row in made.overview.rows}
    assert overview["train-ppo"] == "finished, 12 steps"
    assert overview["reward model's score, held out"] == "0.5 → 2"
    assert overview["response length, tokens"] == "105 → 205"
    assert overview["rewards"] == "segment, cutoff 1.5"
    assert {row[0]: row[1] for row in made.versions.rows} == {
        "device": "CPU",
        "processes": "2",
        "torch": "2.13.0",
    }
    assert made.differences is None


def test_a_run_whose_name_begins_with_an_underscore_is_in_the_legends():
    found: list[Plot] = []
    with drawing("a", "b", found, "x", "y") as axes:
        axes.plot([0, 1], [0, 1], label="_one")
        axes.plot([0, 1], [1, 0])
        axes.bar([0], [1], label="_two")
    texts = re.findall(">([^<>]*(?:_|child)[^<>]*)</text>", found[0].svg)
    assert texts == ["\u200b_one", "\u200b_two"]


def test_iterations_are_whole_numbers_on_their_axis(ppo: MakeRecord):
    for count in (1, 2, 3, 7):
        made = make_report([ppo(kl=[1.0 + i for i in range(count)])])
        (kl,) = [plot for plot in plots(made) if plot.name == "train-ppo-kl"]
        axis = kl.svg[kl.svg.index('id="train-ppo-kl-matplotlib.axis_1"') :]
        axis = axis[: axis.index('id="train-ppo-kl-matplotlib.axis_2"')]
        ticks = re.findall(r">([^<>]+)</text>", axis)[:-1]
        assert ticks and all(re.fullmatch("−?[0-9]+", tick) for tick in ticks), ticks


def test_what_is_always_zero_is_named_and_not_drawn(ppo: MakeRecord):
    run = ppo(kl=[1.0, 2.0], clipped_rewards=[0.0, 0.0], floored_segments=[0.0, 0.1])
    made = make_report([run])
    names = [plot.name for plot in plots(made)]
    assert "train-ppo-clipped_rewards" not in names and "train-ppo-floored_segments" in names
    (policy,) = [section for section in made.sections if section.title == "Policy"]
    assert policy.intro.endswith("Always 0: clipped token rewards.")


def test_many_runs_are_rows_of_one_table(tmp_path: Path):
    made = report(*(write_run(tmp_path / f"run-{i}", iterations=3) for i in range(6)))
    assert made.overview.columns[:3] == ["run", "recipe", "rewards"]
    assert [row[0] for row in made.overview.rows] == [f"run-{i}" for i in range(6)]
    assert {len(row) for row in made.overview.rows} == {len(made.overview.columns)}


def test_a_comparison_shows_what_differs(run_folder: Path, tmp_path: Path):
    other = write_run(tmp_path / "other", iterations=3)
    text = (other / "recipe.yaml").read_text()
    (other / "recipe.yaml").write_text(text.replace("0.02", "0.05") + "seed: 3\n")
    made = report(run_folder, other)
    assert made.title == "run and other" and made.differences is not None
    assert made.differences.rows == [["ppo.kl_coef", "0.02", "0.05"], ["seed", "–", "3"]]
    (kl,) = [plot for plot in plots(made) if plot.name == "train-ppo-kl"]
    assert ">run</text>" in kl.svg and ">other</text>" in kl.svg


def test_an_interrupted_run_does_not_show_the_untrained_policy_as_its_result(ppo: MakeRecord):
    run = ppo(eval_true_reward=[0.284], true_reward=[None, 0.3, 0.41, 0.535])
    rows = {row[0]: row[1] for row in make_report([run]).overview.rows}
    assert rows["true reward, held out"] == "0.284 at step 1"
    assert rows["true reward"] == "0.3 → 0.535 at step 4"
    evaluated = ppo(eval_true_reward=[0.284, None, 0.5], true_reward=[None, 0.3, 0.41])
    rows = {row[0]: row[1] for row in make_report([evaluated]).overview.rows}
    assert rows["true reward, held out"] == "0.284 → 0.5" and "true reward" not in rows


def test_a_run_of_reward_functions_has_their_metrics(ppo: MakeRecord):
    metrics = {"dense_reward": [1.0, 2.0], "kl": [0.0, 1.0], "eval_kl": [0.0, 1.0],
               "reward_brevity": [3.0, 4.0], "eval_reward_brevity": [5.0, 6.0],
               "response_length": [8, 9], "reward_../x": [1.0, 2.0]}  # fmt: skip
    run = ppo(**metrics, entropy=[1.0, 1.0], clipped_rewards=[0.0, 0.0])
    made = make_report([run])
    assert ["reward brevity, held out", "5 → 6"] in [list(row) for row in made.overview.rows]
    names = [plot.name for plot in plots(made)]
    assert {"train-ppo-reward_brevity", "kl-reward_brevity", "kl-dense_reward"} <= set(names)
    assert "length-reward" in names and not any("/" in name for name in names)
    assert not any("did not record" in line for line in missing(run))


def test_a_date_in_a_recipe_is_a_value(run_folder: Path, tmp_path: Path):
    other = write_run(tmp_path / "other")
    with (other / "recipe.yaml").open("a") as file:
        file.write("day: 2024-01-02\n")
    made = report(run_folder, other).differences
    assert made is not None and made.rows == [["day", "–", "2024-01-02"]]


def test_stages_made_with_other_versions_are_told_apart(run_folder: Path):
    book = json.loads((run_folder / "run.json").read_text())
    book["stages"][PPO] = {**book["stages"][PPO], "versions": {"torch": "2.14.0"}}
    (run_folder / "run.json").write_text(json.dumps(book))
    rows = {row[0]: row[1] for row in versions(read_runs([run_folder])).rows}
    assert rows["torch"] == "2.13.0 (train-rm), 2.13.0 (fit-function), 2.14.0 (train-ppo)"


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> list[Plot]:
    """The plots of a comparison, whose names are hard to draw."""
    folder = tmp_path_factory.mktemp("drawn")
    names = ("$a_b$ <x>", "100 % schön 你好")
    return plots(report(*(write_run(folder / name, iterations=3) for name in names)))


def plots(made: Report) -> list[Plot]:
    return [plot for section in made.sections for plot in section.plots]


def test_plots_have_variables_for_colours_and_ids_of_their_own(drawn: list[Plot]):
    found = drawn
    assert len({plot.name for plot in found}) == len(found) > 10
    for plot in found:
        assert set(re.findall(r"#[0-9a-f]{6}\b", plot.svg)) <= {"#000000", "#ffffff"}
        assert "http" not in plot.svg and "<text" in plot.svg
        variables = set(re.findall(r"var\((--[\w-]+)\)", plot.svg))
        assert variables and all(f"{name}:" in css() for name in variables)
    ids = [name for plot in found for name in re.findall(r'\bid="([^"]+)"', plot.svg)]
    assert len(ids) == len(set(ids))
    for plot in found:
        used = re.findall(r'(?:href="#|url\(#)([^")]+)', plot.svg)
        assert set(used) <= set(re.findall(r'\bid="([^"]+)"', plot.svg))


def test_a_plot_is_a_file_of_its_own(drawn: list[Plot]):
    for plot in drawn:
        root = xml.etree.ElementTree.fromstring(plot.file)
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert "prefers-color-scheme: dark" in plot.file


def test_the_same_plot_is_the_same_bytes():
    found: list[Plot] = []
    for _ in range(2):
        with drawing("a", "b", found, "x", "y") as axes:
            axes.scatter([0, 1], [2, 3])
    assert found[0] == found[1]


def test_nothing_drawn_is_no_plot():
    found: list[Plot] = []
    with drawing("a", "b", found, "x", "y"):
        pass
    assert found == []


def test_long_curves_are_thinned():
    metrics = {PPO: lines(PPO, kl=[float(k % 7) for k in range(20_000)])}
    run = RunRecord("run", Path("run"), metrics=metrics)
    assert sum(len(plot.svg) for plot in plots(make_report([run]))) < 200_000


def test_samples_follow_the_held_out_prompts(run_folder: Path):
    first, second = threads(read_runs([run_folder])[0].samples)
    assert (first.heading, second.heading) == ("say <b>hi</b>", "another | prompt")
    assert [sample.step for sample in first.samples] == [0, 12]
    sample = first.samples[0]
    assert (sample.tokens, sample.reward) == (8, 0.25)
    assert [one.reward for one in sample.segments] == ["+0.50", "−0.25", ""]
    assert [one.heat for one in sample.segments] == [1.0, -0.5, None]
    assert "␀" in sample.segments[1].text and sample.segments[2].text == "lone ? half"


def test_other_samples_are_shown_by_iteration():
    of = [{"step": step, "prompt": f"p{step}", "segments": [{"text": "a", "reward": 0}]}
          for step in range(1, 41) for _ in range(9)]  # fmt: skip
    found = threads(of)
    assert [one.heading for one in found] == [f"iteration {k}" for k in (1, 11, 21, 30, 40)]
    assert [len(one.samples) for one in found] == [3] * 5
    assert found[0].samples[0].segments[0].heat == 0


def test_samples_without_segments_or_text_are_left_out(run_folder: Path):
    odd = [{"stage": PPO, "step": 1, "prompt": "p", "segments": "x"},
           {"stage": PPO, "step": 1, "prompt": "p", "segments": [{"text": 3}]},
           {"stage": PPO, "step": 1, "prompt": "empty", "segments": []}]  # fmt: skip
    write_lines(run_folder / "samples.jsonl", odd)
    (thread,) = threads(read_runs([run_folder])[0].samples)
    assert thread.samples[0].prompt == "empty"
