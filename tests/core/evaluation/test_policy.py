"""evaluate policy: against what PPO's own rollouts report, and against the samples it leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from denserl_cli.core.errors import DenserlError
from denserl_cli.core.evaluation.policy import compare, evaluate_policy
from denserl_cli.core.evaluation.responses import score_responses
from denserl_cli.core.evaluation.statistics import best_of
from denserl_cli.core.observer import Observer
from denserl_cli.core.runs.folder import RunFolder
from denserl_cli.core.sandbox import task as sandbox
from denserl_cli.core.stages.run import run_stage
from tests import tiny

FIGURES = {
    *("rm_score", "dense_reward", "kl", "response_length", "terminated"),
    *("segments_per_response", "true_reward"),
}


def evaluate(folder: Path, *settings: str, **options: Any) -> dict[str, Any]:
    recipe = tiny.recipe(*settings)
    return evaluate_policy(recipe, RunFolder(folder, recipe), Observer(), **options)


def samples(folder: Path) -> list[dict[str, Any]]:
    text = (folder / "evaluation" / "policy-samples.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def moved(scored: Path, tmp_path: Path) -> Path:
    """A policy that differs from the one it started from."""
    model = AutoModelForCausalLM.from_pretrained(scored / "sandbox" / "model")
    torch.manual_seed(0)
    with torch.no_grad():
        model.lm_head.weight += 0.1 * torch.randn_like(model.lm_head.weight)
    model.save_pretrained(tmp_path / "moved")
    return tmp_path / "moved"


def test_figures_are_those_of_the_trainers_evaluation(scored: Path):
    settings = ("ppo.eval_samples=3", "ppo.iterations=2")
    run_stage("train-ppo", tiny.recipe(*settings), scored, "start", Observer())
    lines = [json.loads(line) for line in (scored / "metrics.jsonl").read_text().splitlines()]
    first, *_, last = [line for line in lines if line["stage"] == "train-ppo"]
    found = evaluate(scored, *settings, samples=3)
    for name in FIGURES - {"dense_reward"}:
        assert found["start"][name] == pytest.approx(first[f"eval_{name}"], abs=1e-4), name
        assert found["trained"][name] == pytest.approx(last[f"eval_{name}"], abs=1e-4), name
    assert found["start"].keys() == found["trained"].keys() == FIGURES
    assert (found["policy"], found["samples_per_prompt"]) == (str(scored / "policy"), 3)


def test_samples_are_what_the_figures_are_made_of(scored: Path, moved: Path):
    found = evaluate(scored, policy=str(moved), samples=4)
    rows = samples(scored)
    assert len(rows) == 2 * 2 * 4 and found["prompts"] == 2
    for model, side in (("start", "start"), ("policy", "trained")):
        own = [row for row in rows if row["model"] == model]
        for name in FIGURES:
            assert found[side][name] == pytest.approx(np.mean([row[name] for row in own]))
    scores = np.array([row["rm_score"] for row in rows if row["model"] == "start"]).reshape(2, 4)
    best = [(one["n"], one["rm_score"]) for one in found["best_of_n"]]
    assert best == [(k, pytest.approx(best_of(k, scores))) for k in (1, 2, 4)]
    assert best[0][1] == pytest.approx(found["start"]["rm_score"])
    assert best[-1][1] == pytest.approx(scores.max(1).mean())
    task = sandbox.Task(tiny.recipe().sandbox, tiny.recipe().seed)
    for row in rows:
        prompt, response = (turn["content"] for turn in row["messages"])
        assert row["true_reward"] == task.true_reward(prompt, response)
    saved = json.loads((scored / "evaluation" / "policy.json").read_text())
    assert saved == json.loads(json.dumps(found))


def test_scores_are_those_of_score(scored: Path, moved: Path):
    evaluate(scored, policy=str(moved), samples=2)
    rows = [
        row
        for row in samples(scored)  # one word a token, no control tokens in between
        if row["response_length"] == len(row["messages"][-1]["content"].split()) + 1
    ]
    again = score_responses(tiny.recipe(), scored, [row["messages"] for row in rows])
    assert rows
    for row, one in zip(rows, again, strict=True):
        assert row["rm_score"] == pytest.approx(one.score, abs=1e-4)
        assert row["segments_per_response"] == len(one.segments)


def test_the_policy_itself_has_no_difference_and_no_kl(scored: Path):
    found = evaluate(scored, policy=str(scored / "sandbox" / "model"), samples=3)
    for one in found["difference"].values():
        assert one["mean"] == pytest.approx(0, abs=1e-5)
    assert found["trained"]["kl"] == pytest.approx(0, abs=1e-4)
    assert found["equivalent_n"] == pytest.approx(1, abs=0.01)


def test_the_seed_decides_and_nothing_else(scored: Path, moved: Path):
    settings = "ppo.rollout.micro_batch_size=3"
    first = evaluate(scored, policy=str(moved), samples=3)
    rows = samples(scored)
    again = evaluate(scored, settings, policy=str(moved), samples=3)
    assert [row["messages"] for row in samples(scored)] == [row["messages"] for row in rows]
    for name in FIGURES:
        assert again["trained"][name] == pytest.approx(first["trained"][name], abs=1e-4)
    fewer = evaluate(scored, policy=str(moved), samples=2, limit=1)
    assert fewer["prompts"] == 1 and fewer["difference"]["rm_score"]["interval"] is None
    kept = [row["messages"] for row in rows if row["origin"] == rows[0]["origin"]]
    assert [row["messages"] for row in samples(scored)] == [*kept[:2], *kept[3:5]]


def test_parts_do_not_matter(scored: Path, moved: Path, monkeypatch: pytest.MonkeyPatch):
    first = evaluate(scored, policy=str(moved), samples=3)
    monkeypatch.setattr("denserl_cli.core.evaluation.policy.RESPONSES", 2)
    second = evaluate(scored, policy=str(moved), samples=3)
    for name in FIGURES:
        assert second["trained"][name] == pytest.approx(first["trained"][name], abs=1e-4)


def test_all_prompts_of_other_data(scored: Path, moved: Path, tmp_path: Path):
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"write {n}"}) + "\n" for n in range(3)))
    found = evaluate(scored, f"data.prompts={file}", policy=str(moved), samples=1, held_out=False)
    assert found["prompts"] == 3 and found["best_of_n"][-1]["n"] == 1
    assert "true_reward" not in found["start"]
    assert [row["origin"] for row in samples(scored)][:3] == [f"{file}:{n}" for n in (1, 2, 3)]


def test_without_a_normalizer_there_is_no_dense_reward(scored: Path, moved: Path):
    (scored / "reward_model" / "normalizer.json").unlink()
    found = evaluate(scored, policy=str(moved), samples=1)
    assert found["start"].keys() == FIGURES - {"dense_reward"}


def test_the_comparison_by_hand():
    before = {"rm_score": np.array([[0.0, 2.0], [1.0, 3.0]])}
    after = {"rm_score": np.array([[2.0, 2.0], [2.0, 2.0]])}
    found = compare(before, after)
    assert found["start"] == {"rm_score": 1.5} and found["trained"] == {"rm_score": 2.0}
    assert [one["rm_score"] for one in found["best_of_n"]] == [1.5, 2.5]
    assert found["equivalent_n"] == 1.5
    assert found["difference"]["rm_score"]["mean"] == 0.5


def test_a_policy_of_another_vocabulary_is_refused(scored: Path, tmp_path: Path):
    tiny.causal_lm(vocabulary=20).save_pretrained(tmp_path / "other")
    with pytest.raises(DenserlError, match="has a vocabulary of 20"):
        evaluate(scored, policy=str(tmp_path / "other"), samples=1)


def test_nothing_held_out_is_said_so(scored: Path, moved: Path):
    with pytest.raises(DenserlError, match="holds out no prompts"):
        evaluate(scored, "data.eval_prompts=0", policy=str(moved))
