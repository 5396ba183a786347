import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from denserl_cli.core.chat.format import ChatFormat
from denserl_cli.core.chat.loading import load_tokenizer
from denserl_cli.core.data.batches import collate_sequences
from denserl_cli.core.models.causal_lm import load_causal_lm
from denserl_cli.core.observer import Observer
from denserl_cli.core.recipe.schema import ModelConfig, SandboxConfig, SegmentationConfig
from denserl_cli.core.sandbox.files import SandboxFiles, make
from denserl_cli.core.sandbox.language_model import build_model, build_tokenizer
from denserl_cli.core.sandbox.task import MOODS, SUBJECTS, Task, _word, boundary_agreement
from denserl_cli.core.scoring.scorer import Scorer
from tests.core.conftest import TASK
from tests.tiny import frozen

PROMPT = "write calm words about rivers"


@pytest.fixture
def task() -> Task:
    return Task(replace(TASK, response_phrases=4), seed=1)


def text(task: Task, *phrases: int) -> str:
    return " ".join(" ".join(task.phrases[k]) for k in phrases)


# the language


def test_all_words_are_different():
    assert len({_word(index) for index in range(4225)}) == 4225
    assert all(len(_word(index)) == 4 for index in range(4225))


def test_a_prompt_is_a_mood_and_a_subject(task: Task):
    assert len(set(task.prompts)) == len(MOODS) * len(SUBJECTS)
    assert PROMPT in task.prompts


def test_with_several_endings_no_word_is_worth_anything_alone():
    task = Task(replace(TASK, phrases=6, endings=3), seed=1)
    assert len(set(task.phrases)) == 18 and {len(phrase) for phrase in task.phrases} == {3}
    assert len({phrase[0] for phrase in task.phrases}) == 6
    for word in {word for phrase in task.phrases for word in phrase}:
        holders = [k for k, phrase in enumerate(task.phrases) if word in phrase]
        assert len(holders) in (3, 6)  # a beginning's, or an ending's
        np.testing.assert_allclose(task.worth[:, holders].mean(1), 0, atol=1e-12)
    assert task.parse(text(task, 4, 17)) == [(3, 4), (3, 17)] and task.best > 0.5


def test_responses_are_whole_phrases_of_about_the_least_number(task: Task):
    config = SandboxConfig(response_phrases=24)
    rng = np.random.default_rng(0)
    lengths = set()
    for _ in range(200):
        parts = Task(config, 1).parse(Task(config, 1).compose(Task(config, 1).prompts[0], rng))
        assert all(phrase is not None for _, phrase in parts)
        lengths.add(len(parts))
    assert lengths == set(range(24, 29))


def test_responses_of_a_mood_have_its_habit_and_not_its_worth():
    task, rng = Task(TASK, seed=1), np.random.default_rng(0)
    parts = [part for _ in range(800) for part in task.parse(task.compose(PROMPT, rng))]
    used = np.bincount([k for _, k in parts if k is not None], minlength=TASK.phrases)
    order = np.argsort(task.habit[MOODS.index("calm")])
    assert used.argmax() == order[-1] and used.argmin() == order[0]
    pairs = [Task(TASK, seed) for seed in range(100)]
    habit, worth = (
        np.concatenate([getattr(t, n).ravel() for t in pairs]) for n in ("habit", "worth")
    )
    assert abs(np.corrcoef(habit, worth)[0, 1]) < 0.1


def test_a_response_is_split_into_phrases_and_stray_words(task: Task):
    first, *rest = task.phrases[2]
    words = f"{text(task, 0, 3)} {first} {text(task, 1)} {rest[0]} unheard"
    assert task.parse(words) == [(3, 0), (3, 3), (1, None), (3, 1), (1, None), (1, None)]
    assert task.parse("") == []


# the true reward


def test_the_true_reward_is_the_mean_worth_of_the_phrases(task: Task):
    worth = task.worth[MOODS.index("calm")]
    four = text(task, 0, 0, 1, 2)
    assert task.true_reward(PROMPT, four) == pytest.approx((2 * worth[0] + worth[1] + worth[2]) / 4)
    # a fifth phrase is allowed, a missing one counts 0, a stray word -1
    assert task.true_reward(PROMPT, f"{four} {text(task, 3)}") == pytest.approx(
        (2 * worth[0] + worth[1] + worth[2] + worth[3]) / 5
    )
    assert task.true_reward(PROMPT, text(task, 0)) == pytest.approx(worth[0] / 4)
    assert task.true_reward(PROMPT, f"{text(task, 0, 1, 2)} stray") == pytest.approx(
        (worth[:3].sum() - 1) / 4
    )
    assert task.true_reward(PROMPT, "") == 0


def test_the_mood_decides_and_the_subject_does_not(task: Task):
    response = text(task, 0, 1, 1, 3)
    rewards = {
        mood: {task.true_reward(f"write {mood} words about {s}", response) for s in SUBJECTS}
        for mood in MOODS
    }
    assert all(len(values) == 1 for values in rewards.values())
    assert len({min(values) for values in rewards.values()}) == len(MOODS)


def test_a_random_choice_is_worth_nothing_and_the_best_is_known(task: Task):
    np.testing.assert_allclose(task.worth.mean(1), 0, atol=1e-12)
    choice = dict(zip(MOODS, task.worth.argmax(1).tolist(), strict=True))
    best = [task.true_reward(p, text(task, *[choice[p.split()[1]]] * 4)) for p in task.prompts]
    assert np.mean(best) == pytest.approx(task.best)


def test_the_seed_decides_the_worth():
    assert np.array_equal(Task(TASK, 1).worth, Task(TASK, 1).worth)
    assert not np.array_equal(Task(TASK, 1).worth, Task(TASK, 2).worth)


def test_boundaries_found_are_compared_inside_the_responses(task: Task):
    response = text(task, 0, 1, 2)  # phrases end at words 2, 5 and, given, 8
    assert boundary_agreement(task, [(response, [2, 5, 8])]) == (1, 1)
    assert boundary_agreement(task, [(response, [2, 8])]) == (1, 0.5)
    assert boundary_agreement(task, [(response, [1, 2, 4, 5, 8])]) == (0.5, 1)
    assert boundary_agreement(task, [(response, [8])]) == (0, 0)
    assert boundary_agreement(task, [(response, [2, 8]), (response, [5, 7, 8])]) == (2 / 3, 0.5)


# what is made of it


def test_every_word_is_one_token_and_a_response_ends_with_the_terminator(task: Task):
    tokenizer = build_tokenizer(task)
    chat = ChatFormat.of(tokenizer)
    prompt = chat.encode_prompt([{"role": "user", "content": PROMPT}])
    response = chat.encode_response(text(task, 0, 1))
    assert tokenizer.convert_ids_to_tokens(prompt) == [
        "<|user|>", *PROMPT.split(), "<|end|>", "<|assistant|>"
    ]  # fmt: skip
    assert tokenizer.convert_ids_to_tokens(response) == [*text(task, 0, 1).split(), "<|end|>"]
    assert tokenizer.unk_token_id not in prompt + response
    assert tokenizer.decode(response, skip_special_tokens=True) == text(task, 0, 1)
    model = build_model(TASK, len(tokenizer))
    assert model.config.pad_token_id == chat.pad_id == tokenizer.pad_token_id
    assert model.config.eos_token_id == chat.terminator_id


def test_pairs_share_a_prompt_and_mostly_prefer_the_better_answer(slots: SandboxFiles, task: Task):
    rows = [json.loads(line) for line in slots.preferences.read_text().splitlines()]
    assert len(rows) == TASK.pairs
    right = 0
    for row in rows:
        (user, chosen), (same, rejected) = row["chosen"], row["rejected"]
        assert user == same and user["content"] in task.prompts
        gap = task.true_reward(user["content"], chosen["content"]) - task.true_reward(
            user["content"], rejected["content"]
        )
        right += gap > 0
    assert 0.75 < right / len(rows) < 1


def test_the_prompts_are_all_prompts(slots: SandboxFiles, task: Task):
    rows = [json.loads(line)["prompt"] for line in slots.prompts.read_text().splitlines()]
    assert rows == task.prompts


def test_a_seed_makes_the_same_files(tmp_path: Path):
    config = replace(TASK, pairs=4, fit_steps=2)
    folders = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        slots = make(config, tmp_path / name, seed=seed, observer=Observer())
        folders.append([(slots.model / "model.safetensors").read_bytes(),
                        slots.preferences.read_bytes()])  # fmt: skip
    assert folders[0] == folders[1]
    assert folders[0][0] != folders[2][0] and folders[0][1] != folders[2][1]


def test_what_is_there_is_not_made_again(slots: SandboxFiles):
    folder = slots.model.parent
    before = slots.preferences.stat().st_mtime_ns
    again = make(replace(TASK, pairs=1), folder, seed=9, observer=Observer())
    assert again == slots and slots.preferences.stat().st_mtime_ns == before


def test_the_fitted_model_is_surprised_at_the_phrase_boundaries(slots: SandboxFiles, task: Task):
    model = ModelConfig(path=str(slots.model))
    chat = ChatFormat.of(load_tokenizer(model))
    rng = np.random.default_rng(5)
    texts = [task.compose(task.prompts[0], rng) for _ in range(32)]
    prompt = chat.encode_prompt([{"role": "user", "content": PROMPT}])
    batch = collate_sequences([prompt] * 32, [chat.encode_response(t) for t in texts], chat.pad_id)
    scorer = Scorer(
        SegmentationConfig("segment", 1.0), reference=frozen(load_causal_lm(model, trained=False))
    )
    ends = [torch.nonzero(row)[:, 0].tolist() for row in scorer(batch).ends]
    found = boundary_agreement(task, list(zip(texts, ends, strict=True)))
    assert found.precision > 0.95 and found.recall > 0.95
