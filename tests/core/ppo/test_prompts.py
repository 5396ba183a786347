"""Which prompts an iteration sees, and the names of their responses."""

from __future__ import annotations

import numpy as np

from denserl_cli.core.data.conversations import Prompt
from denserl_cli.core.ppo.prompts import EVALUATION, PromptPlan, evaluation_batch


def prompts(count: int) -> list[Prompt]:
    return [Prompt([], f"row {row}", {}, np.array([row])) for row in range(count)]


def plan(*batches: list[int], samples: int = 1) -> PromptPlan:
    rows = [np.array(batch) for batch in batches]
    return PromptPlan(prompts(5), rows, samples=samples, seed=7)


def test_iterations_count_from_1():
    two = plan([3, 1], [0, 4])
    assert two.iterations == 2
    first, second = two.batch(1), two.batch(2)
    assert [prompt.origin for prompt in first.prompts] == ["row 3", "row 1"]
    assert [ids.tolist() for ids in second.ids] == [[0], [4]]
    assert first.keys == [(7, 1, 3, 0), (7, 1, 1, 0)]
    assert second.keys == [(7, 2, 0, 0), (7, 2, 4, 0)]


def test_samples_of_a_prompt_stand_together_and_differ_in_their_key():
    batch = plan([3, 1], samples=2).batch(1)
    assert [ids.tolist() for ids in batch.ids] == [[3], [3], [1], [1]]
    assert batch.keys == [(7, 1, 3, 0), (7, 1, 3, 1), (7, 1, 1, 0), (7, 1, 1, 1)]


def test_a_prompt_that_two_passes_put_into_one_batch_is_answered_twice():
    keys = plan([3, 1, 3], samples=2).batch(1).keys
    assert len(set(keys)) == 6
    assert keys[4:] == [(7, 1, 3, 2), (7, 1, 3, 3)]


def test_evaluation_has_the_same_keys_each_time_and_shares_none_with_training():
    batch = evaluation_batch(prompts(2), seed=7)
    assert batch.keys == [(7, EVALUATION, 0, 0), (7, EVALUATION, 1, 0)]
    assert evaluation_batch(prompts(1), 7, samples=2).keys == [
        (7, EVALUATION, 0, 0),
        (7, EVALUATION, 0, 1),
    ]
    assert [ids.tolist() for ids in batch.ids] == [[0], [1]]
    assert evaluation_batch([], seed=7).prompts == []
