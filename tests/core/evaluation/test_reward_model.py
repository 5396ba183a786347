"""evaluate rm: against the trainer's own evaluation and against scores taken one by one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from denserl_cli.core.data.batches import EncodedPairRow
from denserl_cli.core.errors import DenserlError
from denserl_cli.core.evaluation import reward_bench
from denserl_cli.core.evaluation.responses import score_responses
from denserl_cli.core.evaluation.reward_model import describe, evaluate_reward_model
from denserl_cli.core.observer import Observer
from denserl_cli.core.runs.folder import RunFolder
from tests import tiny

PROMPT = "write calm words about rivers"
WORDS = ("bala dare fabo", "mago nanu pata", "bala dare fabo mago nanu pata", "pata pata")


def evaluate(folder: Path, *settings: str, **options) -> dict:
    recipe = tiny.recipe(*settings)
    options = {"name": "test", **options}
    return evaluate_reward_model(recipe, RunFolder(folder, recipe), Observer(), **options)


def write_pairs(file: Path, subsets: list[str] | None = None) -> list[dict]:
    """Every ordered pair of two of `WORDS`."""
    rows = [{"prompt": PROMPT, "chosen": a, "rejected": b} for a in WORDS for b in WORDS if a != b]
    if subsets is not None:
        rows = [{**row, "subset": subsets[n % len(subsets)]} for n, row in enumerate(rows)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def row(chosen: int, rejected: int, subset: str | None = None) -> EncodedPairRow:
    return EncodedPairRow(
        np.zeros(3), np.zeros(chosen), np.zeros(rejected), None, "x:1", subset=subset
    )


def test_the_held_out_pairs_are_those_of_the_trainer(scored: Path):
    found = evaluate(scored, name="held-out")
    reported = json.loads((scored / "run.json").read_text())["stages"]["train-rm"]["summary"]
    assert found["accuracy"] == reported["eval_accuracy"]
    assert found["length"]["longer_accuracy"] == reported["eval_longer_accuracy"]
    assert (found["pairs"], found["held_out"]) == (4, True)
    assert json.loads((scored / "evaluation" / "rm-held-out.json").read_text()) == json.loads(
        json.dumps(found)
    )


@pytest.mark.parametrize("how", ["mean", "sum", "last"])
def test_scores_are_those_of_single_responses(how: str, scored: Path, tmp_path: Path):
    setting = f"reward_model.aggregate={how}"
    record = scored / "reward_model" / "denserl.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "aggregate": how}))
    rows = write_pairs(tmp_path / "pairs.jsonl")
    found = evaluate(scored, setting, f"data.evaluation={tmp_path / 'pairs.jsonl'}")
    user = {"role": "user", "content": PROMPT}
    talks = [[user, {"role": "assistant", "content": text}] for text in WORDS]
    single = score_responses(tiny.recipe(setting), scored, talks)
    scores = {text: one.score for text, one in zip(WORDS, single, strict=True)}
    gaps = [scores[row["chosen"]] - scores[row["rejected"]] for row in rows]
    assert found["accuracy"] == np.mean(np.array(gaps) > 0) == 0.5  # each pair in both orders
    assert found["margin"] == pytest.approx(np.mean(gaps), abs=1e-6)
    assert found["held_out"] is False and found["truncated"] == 0


def test_pairs_that_were_cut_are_counted(scored: Path, tmp_path: Path):
    write_pairs(tmp_path / "pairs.jsonl")
    limits = ("data.max_length=12", "data.max_prompt_length=8")
    found = evaluate(scored, f"data.evaluation={tmp_path / 'pairs.jsonl'}", *limits)
    # of the six pairs with the long answer, two become identical by the cut
    assert (found["pairs"], found["truncated"], found["skipped"]) == (10, 4, 2)


def test_a_limit_draws_pairs(scored: Path, tmp_path: Path):
    write_pairs(tmp_path / "pairs.jsonl")
    data = f"data.evaluation={tmp_path / 'pairs.jsonl'}"
    first, second = (evaluate(scored, data, limit=5) for _ in range(2))
    assert first["pairs"] == 5 and first == second
    assert evaluate(scored, limit=2)["pairs"] == 2
    assert evaluate(scored, limit=99)["pairs"] == 4


def test_rows_that_cannot_be_used_are_counted_and_listed(scored: Path, tmp_path: Path):
    file = tmp_path / "pairs.jsonl"
    write_pairs(file)
    file.write_text(file.read_text() + 'broken\n{"prompt": "x", "chosen": "a"}\n')
    assert evaluate(scored, f"data.evaluation={file}")["skipped"] == 2
    listed = (scored / "skipped-evaluate-rm.jsonl").read_text()
    assert f"{file}:13" in listed and f"{file}:14" in listed
    with pytest.raises(DenserlError, match="2 rows cannot be used"):
        evaluate(scored, f"data.evaluation={file}", "data.strict=true")


def test_subsets_and_sections_of_the_benchmark(scored: Path, tmp_path: Path):
    file = tmp_path / "pairs.jsonl"
    subsets = ["math-prm", "hep-python", "mt-bench-medium", "mine"]
    write_pairs(file, subsets)
    found = evaluate(scored, f"data.evaluation={file}", benchmark="reward-bench")
    parts = {part["subset"]: part for part in found["subsets"]}
    assert {name: part["section"] for name, part in parts.items()} == {
        "math-prm": "Reasoning",
        "hep-python": "Reasoning",
        "mt-bench-medium": "Chat",
        "mine": "other",
    }
    assert all(part["pairs"] == 3 for part in parts.values())
    weighted = 984 * parts["math-prm"]["accuracy"] + 164 * parts["hep-python"]["accuracy"]
    chat = parts["mt-bench-medium"]["accuracy"]
    assert found["sections"] == pytest.approx({"Chat": chat, "Reasoning": weighted / 1148})
    assert found["section_mean"] == pytest.approx(np.mean(list(found["sections"].values())))
    assert "hep-cpp" in found["absent_subsets"] and len(found["absent_subsets"]) == 20


def test_a_part_of_the_benchmark_is_told(scored: Path, tmp_path: Path):
    file = tmp_path / "pairs.jsonl"
    write_pairs(file, list(reward_bench.SECTIONS["Safety"]))
    file.write_text(file.read_text() + '{"prompt": "x", "chosen": "a", "subset": "donotanswer"}\n')
    found = evaluate(scored, f"data.evaluation={file}", benchmark="reward-bench", limit=12)
    absent, skipped, drawn = found["incomplete"]
    assert absent.startswith("no rows of alpacaeval-easy, ") and absent.endswith("hep-rust")
    assert skipped == "1 rows cannot be used and are not counted"
    assert drawn == "at most 12 rows were drawn (--limit)"
    assert "incomplete" not in evaluate(scored, f"data.evaluation={file}")


def test_the_benchmark_needs_the_column(scored: Path, tmp_path: Path):
    file = tmp_path / "pairs.jsonl"
    write_pairs(file)
    with pytest.raises(DenserlError, match=rf"{file}:1: no column subset"):
        evaluate(scored, f"data.evaluation={file}", benchmark="reward-bench")


def test_ties_are_errors_and_shown_for_each_subset():
    scores = np.array([[1.0, 0.0], [1.0, 1.0], [0.0, 2.0]])
    rows = [row(2, 1, "donotanswer"), row(1, 1, "donotanswer"), row(1, 3)]
    found = describe(rows, scores)
    assert (found["accuracy"], found["ties"]) == (pytest.approx(1 / 3), 1)
    first, second = found["subsets"]
    assert (first["subset"], first["accuracy"], first["ties"]) == ("donotanswer", 0.5, 1)
    assert (second["subset"], second["section"], second["pairs"]) == ("other", "other", 1)
    assert found["sections"] == {"Safety": 0.5}


def test_plain_pairs_have_no_subsets():
    found = describe([row(2, 1)], np.array([[1.0, 0.0]]))
    assert "subsets" not in found and "sections" not in found


def test_a_broken_reward_model_is_an_error_that_names_a_row(scored: Path, tmp_path: Path):
    from safetensors.torch import load_file, save_file

    file = scored / "reward_model" / "model.safetensors"
    weights = load_file(file)
    # finite weights, whose products are not
    weights["score.weight"] = torch.full_like(weights["score.weight"], 3e38)
    weights["model.norm.weight"] *= 1e3
    save_file(weights, file, metadata={"format": "pt"})
    write_pairs(tmp_path / "pairs.jsonl")
    score = "the reward model's score is (nan|-?inf)"
    with pytest.raises(DenserlError, match=rf"pairs\.jsonl:\d+: {score}"):
        evaluate(scored, f"data.evaluation={tmp_path / 'pairs.jsonl'}")
    assert not (scored / "evaluation").exists()
    talk = [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": WORDS[0]}]
    with pytest.raises(DenserlError, match=f"conversation 0: {score}"):
        score_responses(tiny.recipe(), scored, [talk])


def test_nothing_held_out_is_said_so(scored: Path):
    with pytest.raises(DenserlError, match="holds out no pairs"):
        evaluate(scored, "data.eval_pairs=0")


def test_without_a_reward_model_nothing_is_made(tmp_path: Path):
    with pytest.raises(DenserlError, match="no reward model"):
        evaluate(tmp_path / "new")
    assert not (tmp_path / "new").exists()
