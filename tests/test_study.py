import json
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import (
    study,
    study_cost,
    study_english,
    study_real,
    study_real_report,
    study_rewards,
)
from benchmarks.study_report import comparison, cost_table, interval, report, table
from denserl_cli.core.recipe import load_recipe
from denserl_cli.core.sandbox.task import Task
from tests import tiny


def result(arm: str, seed: int, reward: float, factor: str = "granularity") -> dict:
    curve = [[step, reward * step / 3, float(step), 20.0, 5.0, 1.0] for step in (1, 2, 3)]
    return {
        **{"task": "long", "factor": factor, "arm": arm, "seed": seed, "settings": []},
        **{"best_possible": 2.0, "rm_accuracy": 0.8, "columns": list(study.COLUMNS)},
        **{"training": curve, "held_out": [[0, 0.1, 0.0, 20.0, 5.0, 1.0], curve[-1]]},
    }


def test_every_arm_is_a_recipe_and_has_a_name_of_its_own(tmp_path):
    arms = study.grid(quick=False, seeds=[0])
    assert len({(arm.task, arm.slug) for arm in arms}) == len(arms)
    english = study.sandbox_of(tmp_path, next(arm for arm in arms if arm.task == "english"))
    for name in ("model", "pairs.jsonl", "prompts.jsonl"):
        (english / name).mkdir(parents=True)
    for arm in arms:
        (study.second_of(tmp_path, arm) / "policy").mkdir(parents=True, exist_ok=True)
        recipe = study.recipe_of(tmp_path, arm)
        assert recipe.seed == 0 and (recipe.sandbox is None) == (arm.task == "english")


def test_arms_share_what_they_train_alike(tmp_path):
    grid = study.grid(quick=False, seeds=[0])
    arms = {arm.name: arm for arm in grid if arm.task == "medium"}
    long = {arm.name: arm for arm in grid if arm.task == "long"}

    def model(name):
        return study.reward_model_of(tmp_path, arms[name])

    def sandbox(name):
        return study.sandbox_of(tmp_path, arms[name])

    alike = ("normaliser last", "interpolation end", "true reward, response")
    assert {model(name) for name in alike} == {model("segment")}
    same, other = (
        study.reward_model_of(tmp_path, long[n]) for n in ("segment, KL 0.08", "segment")
    )
    assert same == other != model("segment")
    apart = ("token", "bandit", "cutoff 1.0", "random 4", "aggregate sum", "500 pairs")
    assert len({model(name) for name in ("segment", *apart)}) == 7
    assert {sandbox(name) for name in apart[:-1]} == {sandbox("segment")} != {sandbox("500 pairs")}


def test_intervals_by_hand():
    found = interval([1.0, 2.0, 3.0])  # t 4.303 with 2 degrees of freedom, std 1
    assert found.mean == 2 and found.high - 2 == pytest.approx(4.30265 / np.sqrt(3), rel=1e-5)
    assert str(interval([1.5])) == "1.500"


def test_differences_are_paired_by_seed(tmp_path):
    runs = [result("segment", seed, 0.5 + seed) for seed in range(3)]
    runs += [result("token", seed, 0.4 + 0.9 * seed) for seed in range(3)]
    text = table(runs)
    assert "| token | 3 | 1.300 [-0.936, 3.536] | -0.200 [-0.448, 0.048] |" in text
    assert text.index("| segment | 3") < text.index("| token | 3")
    for one in runs:
        file = tmp_path / "results" / "long" / f"{one['arm']}-{one['seed']}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(one))
    report(tmp_path / "results", tmp_path / "report")
    assert text in (tmp_path / "report" / "results.md").read_text()
    assert (tmp_path / "report" / "long-granularity.png").exists()


def test_the_cost_of_a_step_stands_beside_unfinished_results(tmp_path):
    """One seed of one arm, and a file of costs that is no result."""
    costs = {
        "segment": {
            **{"tokens": {"policy forward": 1500, "critic forward": 250}},
            **{"cpu_seconds": 2.04, "peak_megabytes": 653},
        },
        "rloo": {"tokens": {"policy forward": 900}, "cpu_seconds": 1.0, "peak_megabytes": 600},
    }
    assert cost_table(costs).splitlines()[2:] == [
        "| segment | 0.2 | 1.5 | 2.0 | 653 |",
        "| rloo | – | 0.9 | 1.0 | 600 |",
    ]
    (tmp_path / "long").mkdir()
    (tmp_path / "long" / "macro-0.json").write_text(json.dumps(result("macro", 0, 0.4, "action")))
    (tmp_path / "cost.json").write_text(json.dumps(costs))
    report(tmp_path, tmp_path / "report")
    text = (tmp_path / "report" / "results.md").read_text()
    assert "| macro | 1 | 0.400 |" in text and cost_table(costs) in text


def test_a_meter_counts_what_iterations_do_and_nothing_else():
    import torch

    model = torch.nn.Module()
    model.words = torch.nn.Embedding(9, 2)
    model.get_input_embeddings = lambda: model.words
    meter, ids = study_cost.Meter(), torch.zeros(2, 5, dtype=torch.long)
    meter.watch("policy", model)
    collect = meter.sampled(lambda: model.words(ids).sum().item())
    start, stop = meter.timed(collect, lambda: "over")
    model.words(ids)  # an evaluation
    start()
    model.words(ids).sum().backward()
    with torch.no_grad():
        model.words(ids)
    assert stop() == "over"
    model.words(ids)
    found = meter.found()
    assert found["iterations"] == 1 and found["peak_megabytes"] > 0
    assert found["tokens"]["policy forward"] == 20 and found["tokens"]["policy sampling"] == 10
    names = [arm.name for arm in study_cost.arms()]
    assert {"segment", "bandit", "macro", "rloo", "Shapley"} <= set(names)
    assert len(names) == len(set(names)) and not [one for one in names if "lambda" in one]


def test_segment_is_compared_with_its_rivals_under_the_same_settings():
    runs = [result("segment", seed, 0.5 + 0.1 * seed) for seed in range(3)]
    runs += [result("bandit", seed, 0.3) for seed in range(3)]
    runs += [result("segment, lambda 1", 0, 0.1), result("bandit, lambda 1", 0, 0.2)]
    lines = comparison(runs).splitlines()[2:]
    assert lines == [
        "| long | segment − bandit | 3 | 0.300 [0.052, 0.548], above 0 in 3 of 3 "
        "| 0.200 [0.034, 0.366], above 0 in 3 of 3 |",
        "| long | segment, lambda 1 − bandit, lambda 1 | 1 | -0.100, above 0 in 0 of 1 "
        "| -0.067, above 0 in 0 of 1 |",
    ]


def test_the_main_comparison_has_more_seeds_and_a_quick_study_its_arms_alone():
    seeds = {(arm.task, arm.factor): set() for arm in study.grid(quick=False)}
    for arm in study.grid(quick=False):
        seeds[arm.task, arm.factor].add(arm.seed)
    assert min(map(len, seeds.values())) == 5 < len(seeds[study.MAIN])
    quick = study.grid(quick=True)
    assert {(arm.task, arm.factor) for arm in quick} == {study.MAIN}
    assert {arm.name for arm in quick} == set(study.GRANULARITIES)


def test_phrases_are_worth_what_the_task_says():
    recipe = tiny.recipe()
    task = Task(recipe.sandbox, recipe.seed)
    prompt, phrase = task.prompts[0], " ".join(task.phrases[1])
    pieces = [SimpleNamespace(text=f" {phrase}"), SimpleNamespace(text=" " + phrase[:4])]
    assert study_rewards.phrase_worth([prompt], [pieces], recipe) == [
        [pytest.approx(task.worth[0, 1]), -1.0]
    ]


def test_plain_english_by_hand():
    text = "This is plain enough. " + "Very " * 21 + "long. This is plain enough. No."
    assert study_rewards.plain([text, "", "Only one short sentence here."]) == [-1 / 4, 0, 1 / 3]
    row = {"prompt": "p", "chosen": "No.", "rejected": "This is plain enough."}
    pair = study_english.labelled(row)
    assert pair["chosen"][1]["content"] == row["rejected"]
    assert study_english.labelled({**row, "chosen": row["rejected"]}) is None


def test_real_answers_become_a_task(shared):
    rows = study_english.read_rows(shared / "data" / "preferences" / "eval.jsonl")
    texts = [row["chosen"] for row in rows]
    assert len(rows) > 100 and max(len(text.split()) for text in texts) <= study_english.WORDS
    assert sum(1 for row in rows if study_english.labelled(row)) > len(rows) / 2
    tokenizer = study_english.fit_tokenizer(texts)
    ids = tokenizer.encode(texts[0], add_special_tokens=False)
    assert tokenizer.decode(ids) == texts[0]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 5)
    assert len(tokenizer) <= study_english.VOCABULARY


def test_a_study_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    arms = [
        arm._replace(settings=(*tiny.SETTINGS, "ppo.eval_every=4", *arm.settings[:1], TRUE))
        for arm, TRUE in ((study.grid(False, [3])[3], study.TRUE),)
    ]
    monkeypatch.setattr(study, "grid", lambda quick, seeds: arms)
    asked = SimpleNamespace(out=tmp_path, results=tmp_path / "results", seeds=[3], tasks=None,
                            arms=None, factors=None, jobs=1, quick=True,
                            preferences=None)  # fmt: skip
    study.run(asked)
    file = study.result_file(asked.results, arms[0])
    found = json.loads(file.read_text())
    assert len(found["training"]) == 4 and [row[0] for row in found["held_out"]] == [0, 4]
    assert "reward model of long" in capsys.readouterr().out
    study.run(asked)  # nothing is left to do
    assert capsys.readouterr().out == ""


def _scored(arm: str, seed: int) -> dict:
    """A result of the real-text chapter whose scores prefer the better answer in 3 pairs of 4."""
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(40, 2))
    right = np.arange(40) % 4 > 0
    scores = np.where(right[:, None], -np.sort(-scores), np.sort(scores))
    places = [np.arange(1, 31) / 30 for _ in range(60)]
    values = [0.5 * np.log(p) + rng.normal(size=30) * (0.5 + 0.1 * np.log(p)) for p in places]
    return {
        **{"part": "rewards", "arm": arm, "seed": seed, "scores": scores.tolist()},
        "characters": [[10, 20] if n < 10 else [20, 10] for n in range(40)],
        "held_out_values": [one.tolist() for one in values[:30]],
        "fitted_values": [one.tolist() for one in values[30:]],
    }


def test_the_chapter_on_real_text_is_made_from_its_results(tmp_path, capsys):
    results = [_scored("segment", seed) for seed in (0, 1)]
    table = study_real_report.reward_models(results)
    row = next(line for line in table.splitlines() if line.startswith("| segment"))
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    assert cells[:3] == ["segment", "2", cells[2]] and cells[2].startswith("0.750 [")
    assert cells[3].startswith("0.700 [") and cells[4].startswith("0.767 [")
    described = study_real_report.described(results[0])
    assert described["log p"][0] > 0.8 > 0.01 > described["constant"][0]
    assert described["log p"][3] > described["constant"][3]
    for one in results:
        file = tmp_path / "raw" / study_real.Job("rewards", "segment", one["seed"]).file
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(one))
    made = []
    for folder in ("first", "second"):
        study_real_report.report(tmp_path / "raw", tmp_path / folder)
        made.append((tmp_path / folder / "real-text.md").read_bytes())
    assert made[0] == made[1] and (tmp_path / "first" / "real-normaliser.png").exists()


def test_a_bootstrap_interval_counts_seeds_and_pairs():
    one_seed = np.zeros((1, 400))
    one_seed[:, :200] = 1
    alike = study_real_report.bootstrapped(one_seed)
    apart = study_real_report.bootstrapped(np.array([np.ones(400), np.zeros(400)]))
    assert alike.startswith("0.500 [0.4") and apart == "0.500 [0.000, 1.000]"


def test_every_arm_of_the_real_chapter_is_a_recipe_and_what_matters_most_comes_first():
    jobs = study_real.grid(study_real.SEEDS)
    assert {job.arm for job in jobs[:9]} == set(study_real.PROXIES)
    assert len({job.file for job in jobs}) == len(jobs)
    for settings in study_real.ARMS.values():
        load_recipe(study_real.RECIPE, [*study_real.REWARD, *study_real.PPO, *settings])


def test_gold_labels_come_from_the_best_and_the_worst_sample():
    def sample(text: str, score: float) -> dict:
        turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": text}]
        return {"messages": turns, "rm_score": score}

    ranked = study_real._ranked([sample("a", 0.1), sample("b", 0.4), sample("c", 0.2)])
    (pair,) = map(json.loads, ranked)
    assert (pair["chosen"][-1]["content"], pair["rejected"][-1]["content"]) == ("b", "a")
    assert study_real._ranked([sample("a", 0.1), sample("b", 0.1)]) == []
