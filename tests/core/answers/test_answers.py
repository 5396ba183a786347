"""Answers to the benchmarks: questions in, the judges' formats out, nothing lost between."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from denserl_cli.core.answers.formats import BENCHMARKS, Answer, Question
from denserl_cli.core.answers.generate import AnswerGenerator, answer
from denserl_cli.core.answers.job import Job
from denserl_cli.core.answers.questions import read_questions
from denserl_cli.core.chat.format import ChatFormat
from denserl_cli.core.errors import DenserlError, Interrupted
from denserl_cli.core.observer import Observer
from denserl_cli.core.recipe import Recipe, load_recipe
from denserl_cli.core.runs.folder import Mode, RunFolder
from denserl_cli.core.sampling.base import Sampling
from tests import ROOT, tiny
from tests.core.fake_tokenizers import byte_tokenizer, load
from tests.fakes import InterruptingObserver, RecordingObserver

ROWS: dict[str, list[dict[str, Any]]] = {
    "alpaca-eval": [
        {"instruction": "What is love? " * n, "dataset": f"set{n % 2}"} for n in range(1, 8)
    ],
    "arena-hard": [
        {"uid": f"u{n}", "category": "arena-hard-v0.1", "cluster": "c", "prompt": "Sort. " * n}
        for n in range(1, 6)
    ],
    "arena-hard-v2": [
        {"uid": f"v{n}", "category": category, "subcategory": "coding", "prompt": "Tell me. " * n}
        for n, category in enumerate(("hard_prompt", "creative_writing") * 3, 1)
    ],
    "mt-bench": [
        {"question_id": 80 + n, "category": category, "turns": [f"Tell {'me ' * n}", "And now?"]}
        for n, category in enumerate(
            ("writing", "math", "stem", "writing", "coding", "roleplay", "humanities"), 1
        )
    ],
}
FILES = {
    "alpaca-eval": "alpaca_eval_instructions.jsonl",
    "arena-hard": "arena_hard_v0.1_question.jsonl",
    "mt-bench": "mt_bench_question.jsonl",
}


def save_policy(folder: Path, seed: int = 0, context: int = 1024) -> Path:
    """A byte tokenizer with a model that writes nonsense and now and then stops."""
    tokenizer = byte_tokenizer(pad_token="<pad>", eos_token="<end>")
    torch.manual_seed(seed)
    settings = tiny.config(vocabulary=262)
    settings.max_position_embeddings = context
    model = LlamaForCausalLM(settings)
    with torch.no_grad():  # so that some answers end by themselves
        model.lm_head.weight[260] *= 1.5
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_policy(tmp_path_factory.mktemp("policy") / "model")


def recipe_of(policy: Path, *settings: str) -> Recipe:
    words = ["sandbox=null", "segmentation.cutoff=1.0", f"model.path={policy}", *settings]
    return load_recipe("sandbox-segment", words)


def write(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def job_of(name: str, target: Path, rows: list[dict[str, Any]] | None = None, **more: Any) -> Job:
    target.parent.mkdir(parents=True, exist_ok=True)
    file = write(target.with_name("questions.jsonl"), ROWS[name] if rows is None else rows)
    benchmark = BENCHMARKS[name]
    settings = {"policy": None, "generator": "mine", "max_new_tokens": 24, "batch_size": 3}
    return Job(benchmark, read_questions(file, benchmark), target=target, **(settings | more))


def do(job: Job, policy: Path, mode: Mode = "start", observer: Observer | None = None) -> bool:
    recipe = recipe_of(policy)
    run = RunFolder(job.target.parent / "run", recipe)
    return answer(recipe, run, job, mode, observer or Observer())


def read(target: Path) -> list[dict[str, Any]]:
    text = target.read_text(encoding="utf-8")
    return (
        json.loads(text) if target.suffix == ".json" else list(map(json.loads, text.splitlines()))
    )


def timeless(target: Path) -> str:
    """The file's bytes but for the clock."""
    return re.sub(r'"tstamp": [\d.]+', '"tstamp": 0', target.read_text(encoding="utf-8"))


def texts(row: dict[str, Any]) -> list[str]:
    if "choices" in row:
        return row["choices"][0]["turns"]
    return [row["output"] if "output" in row else row["messages"][1]["content"]["answer"]]


def shape(value: Any) -> Any:
    """The keys in their order and the types of a value."""
    if isinstance(value, dict):
        return [(key, shape(inner)) for key, inner in value.items()]
    return [shape(inner) for inner in value] if isinstance(value, list) else type(value).__name__


# --- questions


@pytest.mark.parametrize(
    ("name", "count"), [("alpaca-eval", 805), ("arena-hard", 500), ("mt-bench", 80)]
)
def test_the_benchmarks_own_files_are_read(name: str, count: int, shared: Path):
    questions = read_questions(shared / "data" / "benchmarks" / FILES[name], BENCHMARKS[name])
    assert len(questions) == count
    assert {len(question.turns) for question in questions} == {BENCHMARKS[name].turns}


def test_a_json_list_with_the_references_answers_is_read(tmp_path: Path):
    rows = [{**row, "output": "x", "generator": "text_davinci_003"} for row in ROWS["alpaca-eval"]]
    (tmp_path / "alpaca_eval.json").write_text(json.dumps(rows, indent=2))
    found = read_questions(tmp_path / "alpaca_eval.json", BENCHMARKS["alpaca-eval"])
    assert [question.turns[0] for question in found] == [row["instruction"] for row in rows]


def test_all_problems_of_a_file_are_named_with_their_lines(tmp_path: Path):
    good = ROWS["mt-bench"][0]
    lines = [
        json.dumps(good),
        "{broken",
        json.dumps({**good, "question_id": None}),
        json.dumps({**good, "question_id": 1.5, "category": " "}),
        json.dumps({**good, "question_id": True, "turns": ["one"]}),
        "",
        json.dumps({**good, "question_id": "a", "turns": ["one", 2]}),
        '{"question_id": "b", "category": "math", "turns": ["\\ud800", "x"]}',
        json.dumps(good),
        "[1]",
    ]
    file = tmp_path / "q.jsonl"
    file.write_text("\n".join(lines))
    with pytest.raises(DenserlError) as caught:
        read_questions(file, BENCHMARKS["mt-bench"])
    found = [line.removeprefix(f"{file}:") for line in caught.value.message.splitlines()]
    assert found[0].startswith("2: broken JSON")
    assert found[1:] == [
        "3: no question_id",
        "4: question_id is float, not text",
        "4: category is empty",
        "5: question_id is bool, not text",
        "5: turns is no list of 2 texts",
        "7: turns is int, not text",
        "8: turns is not Unicode text",
        f"9: the same question_id as {file}:1",
        "10: not an object: a row is list",
    ]


def test_many_problems_are_counted(tmp_path: Path):
    file = write(tmp_path / "q.jsonl", [{"uid": "a"}] * 30)
    with pytest.raises(DenserlError, match=r"q\.jsonl:20: no prompt\nand 10 more$"):
        read_questions(file, BENCHMARKS["arena-hard"])


@pytest.mark.parametrize("name", BENCHMARKS)
def test_another_benchmarks_file_is_known_for_what_it_is(name: str, tmp_path: Path):
    for other in BENCHMARKS:
        if other != name:
            file = write(tmp_path / "q.jsonl", ROWS[other])
            with pytest.raises(DenserlError, match=f"looks like {other}'s") as caught:
                read_questions(file, BENCHMARKS[name])
            assert f"--benchmark {other}" in caught.value.hint


@pytest.mark.parametrize("name", BENCHMARKS)
def test_any_other_file_names_the_columns_found_and_wanted(name: str, tmp_path: Path):
    file = write(tmp_path / "q.jsonl", [{"text": "a", "label": 1}])
    with pytest.raises(DenserlError) as caught:
        read_questions(file, BENCHMARKS[name])
    assert caught.value.message.splitlines() == [
        f"{file}: not a question file of {name}",
        "columns found: text, label",
        f"columns wanted: {', '.join(BENCHMARKS[name].fields)}",
    ]


def test_a_category_that_the_judge_does_not_know(tmp_path: Path):
    good = ROWS["arena-hard-v2"][0]
    file = write(tmp_path / "q.jsonl", [good, {**good, "uid": "x", "category": "poems"}])
    with pytest.raises(DenserlError, match=r"2: category is 'poems', not one of hard_prompt, cre"):
        read_questions(file, BENCHMARKS["arena-hard-v2"])


@pytest.mark.parametrize(
    ("text", "message"), [(None, "no such file"), ("", "no questions"), ("\n \n", "no questions")]
)
def test_a_file_without_questions(text: str | None, message: str, tmp_path: Path):
    if text is not None:
        (tmp_path / "q.jsonl").write_text(text)
    with pytest.raises(DenserlError, match=message):
        read_questions(tmp_path / "q.jsonl", BENCHMARKS["arena-hard"])


# --- formats


def question_of(name: str, row: dict[str, Any]) -> Question:
    text = row[BENCHMARKS[name].text_field]
    turns = tuple(text) if isinstance(text, list) else (text,)
    return Question(row[BENCHMARKS[name].id_field], turns, row, "here")


def test_alpaca_evals_sample_answers_come_out_byte_for_byte(shared: Path):
    text = (shared / "data/benchmarks/example_alpaca_eval_outputs.json").read_text()
    rows = json.loads(text)
    questions = [question_of("alpaca-eval", row) for row in rows]
    answers = {row["instruction"]: Answer((row["output"],), 9, 1.0) for row in rows}
    assert BENCHMARKS["alpaca-eval"].write(questions, answers, "example").strip() == text.strip()


def test_arena_hards_sample_answers_come_out_with_their_keys_in_order(shared: Path):
    text = (shared / "data/benchmarks/example_arena_hard_answer.jsonl").read_text()
    for given in map(json.loads, text.splitlines()):
        user, assistant = (message["content"] for message in given["messages"])
        question = question_of("arena-hard", {"uid": given["uid"], "prompt": user})
        mine = {question.id: Answer((assistant["answer"],), 321, given["tstamp"])}
        found = json.loads(BENCHMARKS["arena-hard"].write([question], mine, given["model"]))
        metadata = found.pop("metadata")
        assert shape(found) == shape(given)
        assert {**found, "ans_id": given["ans_id"]} == given
        assert re.fullmatch("[2-9A-HJ-NP-Za-km-z]{22}", found["ans_id"])
        assert metadata["token_len"] == 321


def test_the_style_figures_of_an_answer():
    text = (
        "# A\n## B\n## C\n#none\n1. x\n 2. y\n- z\n* **bold** and __too__\n```\n# no\n- no\n```\n"
    )
    question = question_of("arena-hard", ROWS["arena-hard"][0])
    row = json.loads(
        BENCHMARKS["arena-hard"].write([question], {"u1": Answer((text,), 7, 0.5)}, "m")
    )
    assert row["metadata"] == {
        "token_len": 7,
        "header_count": {"h1": 1, "h2": 2, "h3": 0, "h4": 0, "h5": 0, "h6": 0},
        "list_count": {"ordered": 2, "unordered": 2},
        "bold_count": {"**": 1, "__": 1},
    }


SHAPES = {
    "alpaca-eval": ["instruction", "output", "generator", "dataset", "datasplit"],
    "arena-hard": ["uid", "ans_id", "model", "messages", "tstamp", "metadata"],
    "arena-hard-v2": ["uid", "ans_id", "model", "messages", "tstamp", "metadata"],
    "mt-bench": ["question_id", "answer_id", "model_id", "choices", "tstamp"],
}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_an_answers_file(name: str, policy: Path, tmp_path: Path):
    job = job_of(name, tmp_path / f"mine{BENCHMARKS[name].suffix}")
    before = time.time()
    assert do(job, policy)
    rows, field = read(job.target), BENCHMARKS[name].id_field
    assert [row[field] for row in rows] == [row[field] for row in ROWS[name]]
    assert {tuple(row) for row in rows} == {tuple(SHAPES[name])}
    assert {row[SHAPES[name][2]] for row in rows} == {"mine"}
    assert all(before <= row["tstamp"] <= time.time() for row in rows if "tstamp" in row)
    if name == "alpaca-eval":
        assert [row["dataset"] for row in rows] == [row["dataset"] for row in ROWS[name]]
        assert {row["datasplit"] for row in rows} == {"eval"}
    if name == "mt-bench":
        assert {row["choices"][0]["index"] for row in rows} == {0}
        assert {len(texts(row)) for row in rows} == {2}
    assert sum(bool(text) for row in rows for text in texts(row)) > len(rows) / 2
    assert job.target.read_text().isascii()


@pytest.mark.parametrize(
    ("tokenizer", "name"),
    [("phi3-mini", "arena-hard"), ("llama3.1", "mt-bench")],
)
def test_real_questions_through_real_tokenizers(
    tokenizer: str, name: str, shared: Path, tmp_path: Path
):
    real = load(shared / "tokenizers" / tokenizer)
    settings = tiny.config(vocabulary=len(real) + 60)
    settings.max_position_embeddings = 4096
    torch.manual_seed(0)
    LlamaForCausalLM(settings).save_pretrained(tmp_path / "model")
    real.save_pretrained(tmp_path / "model")
    file = shared / "data" / "benchmarks" / FILES[name]
    questions = read_questions(file, BENCHMARKS[name])[:4]
    job = job_of(name, tmp_path / f"a{BENCHMARKS[name].suffix}", max_new_tokens=5)
    assert do(replace(job, questions=questions), tmp_path / "model")
    rows = read(job.target)
    assert [row[BENCHMARKS[name].id_field] for row in rows] == [q.id for q in questions]
    assert not any("<|" in text for row in rows for text in texts(row))


# --- how answers are made


@pytest.fixture(scope="module")
def byte_model(policy: Path) -> tuple[LlamaForCausalLM, ChatFormat, Any]:
    tokenizer = AutoTokenizer.from_pretrained(policy)
    model = LlamaForCausalLM.from_pretrained(policy, dtype=torch.float32).eval()
    return model, ChatFormat.of(tokenizer), tokenizer


def greedy(byte_model: Any, messages: list[dict[str, str]], limit: int) -> str:
    """An answer by transformers' own greedy generation."""
    model, chat, tokenizer = byte_model
    ids = torch.tensor([chat.encode_prompt(messages)])
    found = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=limit,
        eos_token_id=list(chat.stop_ids),
        pad_token_id=chat.pad_id,
    )[0, ids.shape[1] :]
    return tokenizer.decode(found, skip_special_tokens=True).strip()


def test_the_second_turn_is_asked_after_the_first_answer(
    byte_model: Any, policy: Path, tmp_path: Path
):
    job = job_of("mt-bench", tmp_path / "a.jsonl", temperature=0.0)
    do(job, policy)
    for row, question in zip(read(job.target), ROWS["mt-bench"], strict=True):
        first, second = ({"role": "user", "content": text} for text in question["turns"])
        one = greedy(byte_model, [first], 24)
        two = greedy(byte_model, [first, {"role": "assistant", "content": one}, second], 24)
        assert texts(row) == [one, two]


def test_mt_bench_samples_by_category_and_the_others_are_greedy(
    byte_model: Any, policy: Path, tmp_path: Path
):
    model, chat, tokenizer = byte_model
    job = job_of("mt-bench", tmp_path / "a.jsonl")
    do(job, policy)
    expected = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}
    generator = AnswerGenerator(recipe_of(policy), job)
    for row, question in zip(read(job.target), job.questions, strict=True):
        prompt = np.array(chat.encode_prompt([{"role": "user", "content": question.turns[0]}]))
        temperature = expected.get(question.fields["category"], 0.0)
        assert BENCHMARKS["mt-bench"].temperature(question) == temperature
        number = int.from_bytes(hashlib.sha256(repr(question.id).encode()).digest()[:8])
        sampling = Sampling(24, chat.stop_ids, temperature)
        (drawn,) = tiny.sampler(model).sample([prompt], [(42, number, 0)], sampling)
        ids = drawn.ids[:-1] if drawn.terminated else drawn.ids
        assert texts(row)[0] == tokenizer.decode(ids, skip_special_tokens=True).strip()
    assert {len({generator._temperature(q) for q in part}) for part in generator.batches()} == {1}
    greedily = job_of("mt-bench", tmp_path / "b.jsonl", temperature=0.0)
    do(greedily, policy)
    pairs = zip(read(job.target), read(greedily.target), strict=True)
    same = [one["choices"] == other["choices"] for one, other in pairs]
    assert [same[1], same[4]] == [True, True] and not all(same)


@pytest.mark.parametrize("name", ["alpaca-eval", "arena-hard"])
def test_the_single_turn_benchmarks_are_greedy(
    name: str, byte_model: Any, policy: Path, tmp_path: Path
):
    job = job_of(name, tmp_path / f"a{BENCHMARKS[name].suffix}")
    do(job, policy)
    for row, question in zip(read(job.target), job.questions, strict=True):
        turn = {"role": "user", "content": question.turns[0]}
        assert texts(row) == [greedy(byte_model, [turn], 24)]


def test_neither_batch_size_nor_order_nor_company_changes_an_answer(policy: Path, tmp_path: Path):
    found = []
    for place, (size, rows) in enumerate(
        [(1, None), (3, None), (16, None), (4, ROWS["mt-bench"][::-1]), (2, ROWS["mt-bench"][2:5])]
    ):
        job = job_of("mt-bench", tmp_path / f"{place}.jsonl", rows, batch_size=size)
        do(job, policy)
        found.append(
            {row["question_id"]: (texts(row), row["answer_id"]) for row in read(job.target)}
        )
    assert found[0] == found[1] == found[2] == found[3]
    assert found[4] == {name: found[0][name] for name in found[4]}


def test_a_seed_and_a_question_have_their_own_noise(policy: Path, tmp_path: Path):
    rows = [{**ROWS["mt-bench"][0], "question_id": n} for n in range(4)]
    job = job_of("mt-bench", tmp_path / "a.jsonl", rows, temperature=1.0)
    do(job, policy)
    assert len({json.dumps(texts(row)) for row in read(job.target)}) == 4
    other = job_of("mt-bench", tmp_path / "b.jsonl", rows, temperature=1.0)
    recipe = recipe_of(policy, "seed=7")
    answer(recipe, RunFolder(tmp_path / "r", recipe), other, "start", Observer())
    assert read(job.target)[0]["choices"] != read(other.target)[0]["choices"]


def test_a_question_beyond_the_context_loses_its_beginning(tmp_path: Path):
    narrow = save_policy(tmp_path / "narrow", context=64)
    rows = [{"uid": "long", "prompt": "x" * 200 + "the end"}, {"uid": "short", "prompt": "hi"}]
    job = job_of("arena-hard", tmp_path / "a.jsonl", rows, max_new_tokens=4096)
    recorder = RecordingObserver()
    do(job, narrow, observer=recorder)
    assert any(note.startswith("1 prompts were cut on the left") for note in recorder.notices)
    generator = AnswerGenerator(recipe_of(narrow), job)
    long, short = (generator._prompt(question, []) for question in job.questions)
    assert len(long) == 64 - 16 and len(short) < 10
    lengths = {row["uid"]: row["metadata"]["token_len"] for row in read(job.target)}
    assert lengths["long"] <= 16 and lengths["short"] <= 64 - len(short)


def test_an_earlier_answer_that_cannot_be_written_costs_its_turn_alone(
    policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    whole = ChatFormat.encode_prompt

    def picky(self: ChatFormat, messages: Sequence[dict[str, str]]) -> list[int]:
        if messages[0]["content"] == ROWS["mt-bench"][2]["turns"][0]:
            raise DenserlError("the chat template rewrites the content")
        return whole(self, messages)

    job = job_of("mt-bench", tmp_path / "a.jsonl")
    do(job, policy)
    monkeypatch.setattr(ChatFormat, "encode_prompt", picky)
    other, recorder = job_of("mt-bench", tmp_path / "b.jsonl"), RecordingObserver()
    do(other, policy, observer=recorder)
    expected = [texts(row) for row in read(job.target)]
    expected[2][1] = ""
    assert [texts(row) for row in read(other.target)] == expected
    assert any("1 later turns have an empty answer" in note for note in recorder.notices)


def damaged(folder: Path, change: Callable[[LlamaForCausalLM], object]) -> Path:
    model = LlamaForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        change(model)
    model.save_pretrained(folder)
    return folder


def overflow(model: Any) -> None:
    """Weights that are finite, and whose products are not."""
    signs = torch.tensor([1.0, -1.0]).repeat(model.config.hidden_size // 2)
    model.model.norm.weight.copy_(3e38 * signs)
    model.lm_head.weight.mul_(1e3)


def test_a_policy_that_is_broken_is_refused(tmp_path: Path):
    torn = damaged(save_policy(tmp_path / "nan"), overflow)
    job = job_of("arena-hard", tmp_path / "a" / "a.jsonl", policy=str(torn))
    with pytest.raises(DenserlError, match="logits are NaN"):
        do(job, save_policy(tmp_path / "fine"))
    small = tmp_path / "small"
    tiny.causal_lm(vocabulary=100).save_pretrained(small)
    job = job_of("arena-hard", tmp_path / "b" / "a.jsonl", policy=str(small))
    with pytest.raises(DenserlError, match="ids up to 260, the policy 100 embeddings"):
        do(job, tmp_path / "fine")
    assert not list(tmp_path.rglob("*.progress"))


# --- resuming


@pytest.mark.parametrize("name", BENCHMARKS)
def test_an_interrupted_file_is_resumed_to_the_same_bytes(name: str, policy: Path, tmp_path: Path):
    suffix = BENCHMARKS[name].suffix
    whole, parted = (job_of(name, tmp_path / f"{word}{suffix}") for word in ("whole", "parted"))
    do(whole, policy)
    with pytest.raises(Interrupted, match=r"stopped after 3 of \d answers") as caught:
        do(parted, policy, observer=InterruptingObserver(1))
    assert caught.value.exit_code == 130 and not parted.target.exists()
    with pytest.raises(DenserlError, match="were interrupted") as refused:
        do(parted, policy)
    assert "--resume" in refused.value.hint and "--fresh" in refused.value.hint
    progress = parted.target.with_name(parted.target.name + ".progress")
    lines = progress.read_text().splitlines()
    progress.write_text("\n".join(lines[:3]) + "\n" + lines[3][: len(lines[3]) // 2])
    assert do(parted, policy, "resume")
    assert timeless(parted.target) == timeless(whole.target)
    stamps = {json.loads(line)["id"]: json.loads(line)["tstamp"] for line in lines[1:3]}
    for row in read(parted.target):
        kept = stamps.get(row[BENCHMARKS[name].id_field])
        assert kept is None or row.get("tstamp", kept) == kept


def test_a_killed_process_is_resumed_to_the_same_bytes(policy: Path, tmp_path: Path):
    rows = [{"instruction": f"question {n}", "dataset": "d"} for n in range(16)]
    settings = {"max_new_tokens": 40, "batch_size": 1, "temperature": 1.0}
    whole = job_of("alpaca-eval", tmp_path / "whole.json", rows, **settings)
    do(whole, policy)
    target, progress = tmp_path / "killed.json", tmp_path / "killed.json.progress"
    words = [
        *("answer", "-r", "sandbox-segment", "-b", "alpaca-eval", "-o", str(tmp_path / "run")),
        *("--questions", str(tmp_path / "questions.jsonl"), "--to", str(target)),
        *("--policy", "start", "--generator", "mine", "--temperature", "1"),
        *("--max-new-tokens", "40", "--batch-size", "1", "--set", f"model.path={policy}"),
        *("--set", "sandbox=null", "--set", "segmentation.cutoff=1.0"),
    ]
    command = [sys.executable, "-m", "denserl_cli.app", *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    while process.poll() is None:
        if progress.exists() and progress.read_text().count("\n") > 4:
            process.kill()
        time.sleep(0.005)
    assert process.wait() == -signal.SIGKILL, process.stdout.read().decode()
    assert not target.exists()
    killed = job_of("alpaca-eval", target, rows, **settings)
    assert do(killed, policy, "resume")
    assert timeless(target) == timeless(whole.target)


def test_a_finished_file_is_left_alone(policy: Path, tmp_path: Path):
    job = job_of("mt-bench", tmp_path / "a.jsonl")
    do(job, policy)
    before = job.target.read_bytes()
    for mode in ("start", "resume"):
        assert do(job, policy, mode) is False
    moved = Path(shutil.copytree(policy, tmp_path / "moved"))
    assert do(job_of("mt-bench", job.target, policy=str(moved)), policy) is False
    assert job.target.read_bytes() == before
    recorder = RecordingObserver()
    assert do(job, policy, "fresh", recorder)
    assert any(
        "has judged mine before keeps its old score" in notice for notice in recorder.notices
    )
    assert timeless(job.target) == re.sub(r'"tstamp": [\d.]+', '"tstamp": 0', before.decode())
    assert job.target.read_bytes() != before


def test_ctrl_c_during_a_fresh_run_keeps_the_old_file(policy: Path, tmp_path: Path):
    job = job_of("mt-bench", tmp_path / "a.jsonl")
    do(job, policy)
    before = job.target.read_bytes()
    with pytest.raises(Interrupted):
        do(job, policy, "fresh", InterruptingObserver(1))
    assert job.target.read_bytes() == before
    with pytest.raises(DenserlError, match="were interrupted"):
        do(job, policy)
    assert do(job, policy, "resume") and job.target.read_bytes() != before


def test_answers_made_otherwise_are_not_continued(policy: Path, tmp_path: Path):
    job = job_of("mt-bench", tmp_path / "a.jsonl")
    do(job, policy)
    others = {
        "temperature was null, is 0.5": {"temperature": 0.5},
        "max_new_tokens was 24, is 9": {"max_new_tokens": 9},
        'generator was "mine", is "yours"': {"generator": "yours"},
        "questions was": {"rows": ROWS["mt-bench"][:3]},
        "policy was": {"policy": str(save_policy(tmp_path / "other", seed=1))},
    }
    for message, more in others.items():
        with pytest.raises(DenserlError, match=re.escape(message)) as caught:
            do(job_of("mt-bench", job.target, **more), policy, "resume")
        assert "--to" in caught.value.hint and "--fresh" in caught.value.hint
    batch = job_of("mt-bench", job.target, batch_size=1)
    assert do(batch, policy) is False  # a smaller batch for a smaller GPU is no other answer


def half(path: Path) -> None:
    text = path.read_text()
    path.write_text(text[: len(text) * 3 // 5])


def twice(path: Path) -> None:
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines, lines[-1]]) + "\n")


def strange(path: Path) -> None:
    path.write_text(path.read_text().replace('"question_id": 83', '"question_id": 8300'))


def empty(path: Path) -> None:
    path.write_text("")


@pytest.mark.parametrize("known", [True, False], ids=["mine", "unknown"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (half, r"a\.jsonl:5: broken JSON(.|\n)*a\.jsonl: 3 of 7 answers are missing"),
        (twice, r"a\.jsonl:8: a second answer to question_id '87'"),
        (strange, r"a\.jsonl:3: answers no question: question_id '8300'"),
        (empty, r"a\.jsonl: 7 of 7 answers are missing"),
    ],
)
def test_a_damaged_answers_file(
    damage: Callable[[Path], None], message: str, known: bool, policy: Path, tmp_path: Path
):
    job = job_of("mt-bench", tmp_path / "a.jsonl")
    do(job, policy)
    if not known:
        (tmp_path / "a.jsonl.progress").unlink()
    damage(job.target)
    for mode in ("start", "resume"):
        with pytest.raises(DenserlError, match=message) as caught:
            do(job, policy, mode)
        assert "--fresh" in caught.value.hint
    assert do(job, policy, "fresh") and len(read(job.target)) == 7


def test_an_answers_file_that_nobody_knows_is_not_replaced(policy: Path, tmp_path: Path):
    job = job_of("alpaca-eval", tmp_path / "a.json")
    do(job, policy)
    (tmp_path / "a.json.progress").unlink()
    with pytest.raises(DenserlError, match=r"is there already, and no a\.json\.progress"):
        do(job, policy, "resume")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: ["{torn", *lines[1:]], r"progress:1: damaged"),
        (lambda lines: ["[]", *lines[1:]], r"progress:1: damaged"),
        (lambda lines: [lines[0], lines[1][:20], *lines[2:]], r"progress:2: no answer"),
        (lambda lines: [*lines, lines[1]], r"progress:5: a second answer to question_id"),
        (lambda lines: [*lines, lines[1].replace('"id": 8', '"id": 9')], "5: answers no question"),
        (lambda lines: [*lines[:2], '{"id": 81}'], r"progress:3: no answer"),
        (lambda lines: [*lines[:2], re.sub(r"\[.*\]", '"ab"', lines[2])], r"3: no answer"),
    ],
)
def test_damaged_progress(
    change: Callable[[list[str]], list[str]], message: str, policy: Path, tmp_path: Path
):
    job = job_of("mt-bench", tmp_path / "a.jsonl")
    with pytest.raises(Interrupted):
        do(job, policy, observer=InterruptingObserver(1))
    progress = tmp_path / "a.jsonl.progress"
    progress.write_text("".join(f"{line}\n" for line in change(progress.read_text().splitlines())))
    with pytest.raises(DenserlError, match=message):
        do(job, policy, "resume")
    assert do(job, policy, "fresh")


@pytest.mark.parametrize("name", ["a.txt", "a.json", "a", "folder.jsonl"])
def test_a_target_that_the_judge_cannot_read(name: str, policy: Path, tmp_path: Path):
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(DenserlError, match=r"--to .*(are a \.jsonl file|is a folder)"):
        do(job_of("mt-bench", tmp_path / name), policy)
