"""Sampling: exact inversion, no dependence on the batch, nothing hidden."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from denserl_cli.core.sampling.base import Response, Sampling
from denserl_cli.core.sampling.draw import noise
from tests import tiny

STOPS = (5, 11)
SAMPLING = Sampling(max_new_tokens=8, stop_ids=STOPS, temperature=0.9)
PROMPTS = [np.arange(1, 1 + length, dtype=np.int32) for length in (3, 1, 7, 4, 2, 9, 5, 6)]


@pytest.fixture(scope="module")
def model():
    return tiny.causal_lm()


KEYS = [(0, 1, row, 0) for row in range(len(PROMPTS))]


def sample(model, prompts=PROMPTS, sampling=SAMPLING, keys=KEYS, rows=None, pad_id=0, **options):
    return tiny.sampler(model, rows, pad_id).sample(prompts, keys, sampling, **options)


def same(left: list[Response], right: list[Response]) -> bool:
    return [(r.ids.tolist(), r.terminated) for r in left] == [
        (r.ids.tolist(), r.terminated) for r in right
    ]


def by_hand(model, prompt: np.ndarray, sampling: Sampling, key) -> Response:
    """One token at a time, the whole sequence through the model each time."""
    ids, logprobs = prompt.tolist(), []
    for number in noise([key], sampling.max_new_tokens)[0]:
        logits = model(torch.tensor([ids])).logits[0, -1].double()
        probabilities = torch.softmax(logits / sampling.temperature, 0)
        ids.append(int((probabilities.cumsum(0) > number).nonzero()[0]))
        logprobs.append(float(probabilities[ids[-1]].log()))
        if ids[-1] in sampling.stop_ids:
            break
    return Response(np.array(ids[len(prompt) :]), ids[-1] in sampling.stop_ids, np.array(logprobs))


def test_a_sample_is_what_one_token_at_a_time_gives(model):
    found = sample(model)
    expected = [
        by_hand(model, prompt, SAMPLING, key) for prompt, key in zip(PROMPTS, KEYS, strict=True)
    ]
    assert same(found, expected)
    assert {r.terminated for r in found} == {True, False}
    assert {int(r.ids[-1]) for r in found if r.terminated} == set(STOPS)


def test_neither_batch_nor_order_changes_a_response(model):
    together = sample(model)
    alone = [
        sample(model, [prompt], keys=[key])[0] for prompt, key in zip(PROMPTS, KEYS, strict=True)
    ]
    backwards = sample(model, PROMPTS[::-1], keys=KEYS[::-1])[::-1]
    assert same(together, alone) and same(together, backwards)


def test_padding_with_a_stop_token_changes_nothing(model):
    expected = sample(model)
    assert same(sample(model, pad_id=STOPS[0]), expected)


def test_a_stop_token_in_the_prompt_stops_nothing(model):
    prompts = [np.array([5, 3, 11, 5]), np.array([2])]
    found = sample(model, prompts, keys=KEYS[:2], pad_id=5)
    expected = [by_hand(model, p, SAMPLING, k) for p, k in zip(prompts, KEYS, strict=False)]
    assert same(found, expected)


def test_rows_that_have_ended_leave_the_batch(model):
    sizes: list[int] = []
    hook = model.register_forward_pre_hook(
        lambda _, __, inputs: sizes.append(len(inputs["input_ids"])), with_kwargs=True
    )
    found = sample(model)
    hook.remove()
    lengths = [len(response.ids) for response in found]
    assert sizes == [sum(n > step for n in lengths) for step in range(max(lengths))]
    assert sizes[-1] < len(PROMPTS)


def test_a_batch_ends_with_its_last_row(model):
    calls: list[int] = []
    hook = model.register_forward_pre_hook(lambda *_: calls.append(1))
    every = Sampling(max_new_tokens=10, stop_ids=tuple(range(20)))
    found = sample(model, sampling=every)
    hook.remove()
    assert len(calls) == 1
    assert [(len(r.ids), r.terminated) for r in found] == [(1, True)] * len(PROMPTS)


def test_the_length_limit_leaves_a_response_unterminated(model):
    never = Sampling(max_new_tokens=6, stop_ids=(19_999,))
    found = sample(model, sampling=never)
    assert [(len(r.ids), r.terminated) for r in found] == [(6, False)] * len(PROMPTS)


def test_a_stop_token_on_the_last_place_terminates(model):
    response = next(r for r in sample(model) if r.terminated)
    limit = SAMPLING._replace(max_new_tokens=len(response.ids))
    again = sample(model, sampling=limit)
    assert response.ids.tolist() in [r.ids.tolist() for r in again if r.terminated]


def test_the_cold_limit_is_greedy_generation(model):
    greedy = Sampling(max_new_tokens=12, stop_ids=STOPS, temperature=1e-5)
    found = sample(model, sampling=greedy)
    for prompt, response in zip(PROMPTS, found, strict=True):
        ids = torch.from_numpy(prompt.astype(np.int64))[None]
        expected = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=12,
            eos_token_id=list(STOPS),
            pad_token_id=0,
        )[0, len(prompt) :]
        assert response.ids.tolist() == expected.tolist()


def test_temperature_0_takes_the_likeliest_token(model):
    greedy, cold = (SAMPLING._replace(temperature=t) for t in (0.0, 1e-5))
    found = sample(model, sampling=greedy)
    assert same(found, sample(model, sampling=cold))


def test_each_row_may_have_a_limit_of_its_own(model):
    whole = sample(model)
    limits = [1, 8, 3, 2, 8, 1, 5, 4]
    found = sample(model, limits=limits)
    expected = [
        Response(r.ids[:limit], r.terminated and len(r.ids) <= limit, r.logprobs[:limit])
        for r, limit in zip(whole, limits, strict=True)
    ]
    assert same(found, expected)
    assert not same(found, whole)


def test_nothing_of_a_generation_config_leaks_in(model):
    expected = sample(model)
    other = tiny.causal_lm()
    other.generation_config.update(
        do_sample=True,
        temperature=0.1,
        top_k=1,
        top_p=0.1,
        repetition_penalty=5.0,
        eos_token_id=3,
        max_new_tokens=2,
        bad_words_ids=[[7]],
    )
    assert same(sample(other), expected)
