"""Benchmarks with several answers to a prompt: files in, official scores out."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from denserl_cli.core.errors import DenserlError
from denserl_cli.core.evaluation.benchmarks import FORMATS, RANKED
from denserl_cli.core.evaluation.responses import score_responses
from denserl_cli.core.evaluation.reward_bench_2 import SUBSETS
from denserl_cli.core.evaluation.reward_model import evaluate_reward_model
from denserl_cli.core.runs.folder import RunFolder
from tests import tiny
from tests.fakes import RecordingObserver

PROMPT = "write calm words about rivers"
WORDS = ("bala dare fabo", "mago nanu pata", "pata pata", "bala dare fabo mago nanu pata")


def reward_bench_2_rows() -> list[dict[str, Any]]:
    rows = [
        {"subset": name, "id": f"{place}", "chosen": [WORDS[place % 4]],
         "rejected": [word for word in WORDS if word != WORDS[place % 4]]}
        for place, name in enumerate(SUBSETS[:5])
    ]  # fmt: skip
    rows += [
        {"subset": "Ties", "id": "ref:0", "chosen": [WORDS[0]], "rejected": [WORDS[1]]},
        {"subset": "Ties", "id": "tied:0", "chosen": [*WORDS[2:]], "rejected": [WORDS[1]]},
    ]
    return [{**row, "prompt": PROMPT, "num_correct": len(row["chosen"])} for row in rows]


def rm_bench_rows() -> list[dict[str, Any]]:
    domains = ("chat", "code", "math", "safety-refuse", "safety-response")
    return [
        {"id": f"{place}", "prompt": PROMPT, "domain": domain,
         "chosen": list(np.roll(WORDS, place)[:3]), "rejected": list(np.roll(WORDS, place)[1:])}
        for place, domain in enumerate(domains)
    ]  # fmt: skip


def judgebench_rows() -> list[dict[str, Any]]:
    sources = ("mmlu-pro-law", "livebench-reasoning", "livebench-math", "livecodebench")
    return [
        {"pair_id": f"{place}", "source": source, "question": PROMPT, "response_model": "gpt",
         "response_A": WORDS[place], "response_B": WORDS[place - 1], "label": label}
        for place, (source, label) in enumerate(zip(sources, ("A>B", "B>A") * 2, strict=True))
    ]  # fmt: skip


ROWS: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "reward-bench-2": reward_bench_2_rows,
    "rm-bench": rm_bench_rows,
    "judgebench": judgebench_rows,
}


def write(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def evaluate(
    folder: Path, benchmark: str, file: Path, *settings: str, limit: int | None = None
) -> tuple[dict[str, Any], RecordingObserver]:
    recipe, recorder = tiny.recipe(f"data.evaluation={file}", *settings), RecordingObserver()
    run = RunFolder(folder, recipe)
    found = evaluate_reward_model(
        recipe, run, recorder, name="test", limit=limit, benchmark=benchmark
    )
    return found, recorder


@pytest.fixture
def scores(scored: Path) -> dict[str, float]:
    """The score of each of `WORDS`, taken one by one."""
    user = {"role": "user", "content": PROMPT}
    talks = [[user, {"role": "assistant", "content": text}] for text in WORDS]
    found = score_responses(tiny.recipe(), scored, talks)
    return {text: one.score for text, one in zip(WORDS, found, strict=True)}


def test_rm_bench_by_scores_taken_one_by_one(scored: Path, tmp_path: Path, scores):
    rows = rm_bench_rows()
    found, _ = evaluate(scored, "rm-bench", write(tmp_path / "b.jsonl", rows))
    levels = {}
    for row in rows:
        wins = [[scores[a] > scores[b] for b in row["rejected"]] for a in row["chosen"]]
        table = np.array(wins, float)
        hard = (table[0, 1] + table[0, 2] + table[1, 2]) / 3
        easy = (table[1, 0] + table[2, 0] + table[2, 1]) / 3
        levels[row["domain"]] = np.array([hard, np.mean(np.diag(table)), easy])
    safety = (levels["safety-refuse"] + levels["safety-response"]) / 2
    domains = np.mean([levels["chat"], levels["code"], levels["math"], safety], axis=0)
    assert [found["hard"], found["normal"], found["easy"]] == pytest.approx(domains)
    assert found["score"] == pytest.approx(domains.mean())
    assert (found["rows"], found["answers"], found["skipped"]) == (5, 30, 0)
    assert found["incomplete"] == [] and found["benchmark"] == "rm-bench"


def test_reward_bench_2_by_scores_taken_one_by_one(scored: Path, tmp_path: Path, scores):
    rows = reward_bench_2_rows()
    found, _ = evaluate(scored, "reward-bench-2", write(tmp_path / "b.jsonl", rows))
    best = max(WORDS, key=scores.__getitem__)
    parts = {part["subset"]: part["score"] for part in found["parts"]}
    for row in rows[:5]:
        assert parts[row["subset"]] == (row["chosen"] == [best])
    assert found["ties"]["accuracy_ref"] == (scores[WORDS[0]] > scores[WORDS[1]])
    assert found["score"] == pytest.approx(np.mean(list(parts.values())))
    assert (found["answers"], found["incomplete"]) == (5 * 4 + 2 + 3, [])


def test_judgebench_by_scores_taken_one_by_one(scored: Path, tmp_path: Path, scores):
    rows = judgebench_rows()
    found, _ = evaluate(scored, "judgebench", write(tmp_path / "b.jsonl", rows))
    right = [
        (scores[row["response_A"]] > scores[row["response_B"]]) == (row["label"] == "A>B")
        for row in rows
    ]
    assert found["score"] == found["macro_average"] == np.mean(right)
    assert json.loads((scored / "evaluation" / "rm-test.json").read_text()) == json.loads(
        json.dumps(found)
    )


@pytest.mark.parametrize("name", RANKED)
def test_a_batch_changes_nothing(name: str, scored: Path, tmp_path: Path):
    file = write(tmp_path / "b.jsonl", ROWS[name]())
    one = evaluate(scored, name, file, "reward_model.micro_batch_size=1")[0]
    assert evaluate(scored, name, file)[0]["score"] == one["score"]


@pytest.mark.parametrize("name", RANKED)
def test_a_limit_draws_rows_and_is_told(name: str, scored: Path, tmp_path: Path):
    file = write(tmp_path / "b.jsonl", ROWS[name]())
    (first, recorder), (second, _) = (evaluate(scored, name, file, limit=3) for _ in range(2))
    assert first["rows"] == 3 and first == second and first["score"] is None
    assert f"{len(ROWS[name]()) - 3} rows were not drawn (--limit)" in first["incomplete"]
    assert any(f"not the official score of {name}" in notice for notice in recorder.notices)
    assert evaluate(scored, name, file, limit=99)[0]["incomplete"] == []


def test_cut_answers_are_counted_and_share_one_prompt(scored: Path, tmp_path: Path):
    file = write(tmp_path / "b.jsonl", judgebench_rows())
    limits = ("data.max_length=12", "data.max_prompt_length=8")
    found, _ = evaluate(scored, "judgebench", file, *limits)
    # the pairs of the long answer: with the one it begins like, it is a tie after the cut
    assert (found["rows"], found["truncated"], found["incomplete"]) == (4, 2, [])
    assert sum(part["ties"] for part in found["parts"]) == 1


def test_rows_that_cannot_be_written_are_told_and_listed(
    scored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from denserl_cli.core.chat.format import ChatFormat

    whole = ChatFormat.answer_layouts

    def refusing(chat: ChatFormat, messages: Any) -> Any:
        if messages[-1]["content"] == "unwritable":
            raise DenserlError("the template refuses it")
        return whole(chat, messages)

    monkeypatch.setattr(ChatFormat, "answer_layouts", refusing)
    rows = judgebench_rows()
    rows.append({**rows[0], "response_B": "unwritable"})
    file = write(tmp_path / "b.jsonl", rows)
    found, recorder = evaluate(scored, "judgebench", file)
    assert (found["rows"], found["skipped"]) == (4, 1)
    assert found["incomplete"] == ["1 rows cannot be encoded and are not counted"]
    assert f"{file}:5" in (scored / "skipped-evaluate-rm.jsonl").read_text()
    assert any("skipped 1 x the template refuses it" in notice for notice in recorder.notices)
    with pytest.raises(DenserlError, match="1 rows cannot be used"):
        evaluate(scored, "judgebench", file, "data.strict=true")


def test_rows_that_are_not_the_benchmarks_are_refused_all_at_once(scored: Path, tmp_path: Path):
    *rest, last = reward_bench_2_rows()
    file = write(tmp_path / "b.jsonl", [*rest, last, last, {**last, "subset": "Chat"}, {"a": 1}])
    file.write_text(file.read_text() + "broken\n[1]\n")
    with pytest.raises(DenserlError) as caught:
        evaluate(scored, "reward-bench-2", file)
    lines = [line.removeprefix(f"{file}:") for line in caught.value.message.splitlines()]
    assert lines[0].startswith("9: subset is 'Chat', not one of Factuality")
    assert lines[1] == "10: subset is empty, not text"
    assert lines[2].startswith("11: broken JSON")
    assert lines[3:] == [
        "12: not an object: a row is list",
        f"8: the same id as {file}:7: 'tied:0'",
    ]
    assert not (scored / "evaluation").exists()


@pytest.mark.parametrize("name", FORMATS)
def test_another_file_names_the_columns_found_and_wanted(name: str, scored: Path, tmp_path: Path):
    file = write(tmp_path / "b.jsonl", [{"instruction": "a", "output": "b"}])
    with pytest.raises(DenserlError) as caught:
        evaluate(scored, name, file)
    first, found, wanted = caught.value.message.splitlines()
    assert first.startswith(f"{file}:1: no column") and f"not a row of {name}" in first
    assert found == "columns found: instruction, output"
    assert wanted == f"columns wanted: {', '.join(FORMATS[name].columns)}"
    assert "--data" in caught.value.hint


PAIR = {"prompt": PROMPT, "chosen": "a", "rejected": "b", "subset": "donotanswer", "id": 1}


@pytest.mark.parametrize(("name", "other"), permutations(FORMATS, 2))
def test_another_benchmarks_file_is_known_for_what_it_is(
    name: str, other: str, scored: Path, tmp_path: Path
):
    file = write(tmp_path / "b.jsonl", [PAIR] if other == "reward-bench" else ROWS[other]())
    with pytest.raises(DenserlError, match=f"not a row of {name}") as caught:
        evaluate(scored, name, file)
    assert caught.value.hint == f"this looks like {other}: pass --benchmark {other}"


def test_weights_and_draws_of_a_source_are_refused(scored: Path, tmp_path: Path):
    file = write(tmp_path / "b.jsonl", judgebench_rows())
    for setting in ("weight: 2", "max_samples: 2"):
        recipe = tiny.recipe(f"data.evaluation=[{{path: {file}, {setting}}}]")
        run = RunFolder(scored, recipe)
        with pytest.raises(DenserlError, match="each row of judgebench counts once"):
            evaluate_reward_model(
                recipe, run, RecordingObserver(), name="x", benchmark="judgebench"
            )


def test_an_empty_file(scored: Path, tmp_path: Path):
    with pytest.raises(DenserlError, match="no rows in"):
        evaluate(scored, "rm-bench", write(tmp_path / "b.jsonl", []))
