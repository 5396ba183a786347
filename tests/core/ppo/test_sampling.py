"""Sampling: exact inversion, no dependence on the batch, nothing hidden."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from denserl_cli.core.ppo.sampling import Response, Sampling, draw, noise, sample
from tests import tiny

STOPS = (5, 11)
SAMPLING = Sampling(max_new_tokens=8, stop_ids=STOPS, temperature=0.9)
PROMPTS = [np.arange(1, 1 + length, dtype=np.int32) for length in (3, 1, 7, 4, 2, 9, 5, 6)]


@pytest.fixture(scope="module")
def model():
    return tiny.causal_lm()


def uniforms(count: int = len(PROMPTS), tokens: int = SAMPLING.max_new_tokens) -> torch.Tensor:
    return noise([(0, 1, row, 0) for row in range(count)], tokens)


def same(left: list[Response], right: list[Response]) -> bool:
    return [(r.ids.tolist(), r.terminated) for r in left] == [
        (r.ids.tolist(), r.terminated) for r in right
    ]


def by_hand(model, prompt: np.ndarray, sampling: Sampling, uniform: torch.Tensor) -> Response:
    """One token at a time, the whole sequence through the model each time."""
    ids = prompt.tolist()
    for number in uniform:
        logits = model(torch.tensor([ids])).logits[0, -1].double()
        cumulative = torch.softmax(logits / sampling.temperature, 0).cumsum(0)
        ids.append(int((cumulative > number).nonzero()[0]))
        if ids[-1] in sampling.stop_ids:
            return Response(np.array(ids[len(prompt) :]), True)
    return Response(np.array(ids[len(prompt) :]), False)


def drawn(probabilities: list[float], count: int = 10_000, **settings: float) -> list[int]:
    """How often each token comes on a regular grid of uniforms."""
    grid = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    logits = torch.tensor(probabilities).log().expand(count, -1)
    tokens = draw(logits, grid, **{"temperature": 1.0, "top_p": 1.0, **settings})
    return torch.bincount(tokens, minlength=len(probabilities)).tolist()


def test_draw_inverts_the_distribution():
    assert drawn([0.5, 0.125, 0.25, 0.125]) == [5000, 1250, 2500, 1250]


def test_draw_tempers():
    # p² / sum p²: 16, 1, 4, 1 of 22
    counts = drawn([0.5, 0.125, 0.25, 0.125], count=22_000, temperature=0.5)
    assert counts == pytest.approx([16_000, 1000, 4000, 1000], abs=1)


@pytest.mark.parametrize(
    ("top_p", "expected"),
    [(0.79, [0, 3 / 8, 0, 5 / 8]), (0.81, [0, 0.3 / 0.95, 0.15 / 0.95, 0.5 / 0.95]), (0.01, None)],
)
def test_draw_keeps_the_smallest_set_that_reaches_top_p(top_p: float, expected):
    counts = drawn([0.05, 0.3, 0.15, 0.5], top_p=top_p)
    expected = expected or [0, 0, 0, 1]
    assert counts == pytest.approx([10_000 * p for p in expected], abs=1)


def test_draw_never_gives_a_token_of_probability_0():
    inf = float("inf")
    logits = torch.tensor([[-inf, 0.0, -inf, 1.0, -inf]]).expand(4, -1)
    edges = torch.tensor([0.0, 1e-300, 1 - 2**-53, 0.5], dtype=torch.float64)
    assert draw(logits, edges, temperature=1.0, top_p=1.0).tolist() == [1, 1, 3, 3]
    underflown = torch.tensor([[0.0, *[-200.0] * 50_000]])
    last = draw(underflown, edges[2:3], temperature=1.0, top_p=1.0)
    assert last.tolist() == [0]


@pytest.mark.parametrize("vocabulary", [5, 255, 256, 257, 1000])
def test_draw_passes_the_cumulative_distribution_where_it_was_asked(vocabulary: int):
    generator = torch.Generator().manual_seed(vocabulary)
    logits = 4 * torch.randn(500, vocabulary, generator=generator)
    logits[:, vocabulary // 3 : vocabulary // 2] = -float("inf")
    uniform = torch.rand(500, dtype=torch.float64, generator=generator)
    cumulative = logits.softmax(1).double().cumsum(1)
    plain = (cumulative > uniform[:, None] * cumulative[:, -1:]).int().argmax(1)
    assert draw(logits, uniform, temperature=1.0, top_p=1.0).tolist() == plain.tolist()


def test_noise_depends_on_the_key_alone():
    keys = [(1, 2, 3, 0), (1, 2, 3, 1), (1, 3, 3, 0), (2, 2, 3, 0), (1, 2, 4, 0)]
    rows = noise(keys, 6)
    assert rows.dtype == torch.float64 and rows.shape == (5, 6)
    assert len({tuple(row) for row in rows.tolist()}) == 5
    assert torch.equal(noise(keys[::-1], 6).flip(0), rows)
    assert torch.equal(noise(keys[2:3], 4)[0], rows[2, :4])
    assert (rows >= 0).all() and (rows < 1).all()


def test_a_sample_is_what_one_token_at_a_time_gives(model):
    found = sample(model, PROMPTS, SAMPLING, uniforms(), pad_id=0)
    expected = [
        by_hand(model, prompt, SAMPLING, row)
        for prompt, row in zip(PROMPTS, uniforms(), strict=True)
    ]
    assert same(found, expected)
    assert {r.terminated for r in found} == {True, False}
    assert {int(r.ids[-1]) for r in found if r.terminated} == set(STOPS)


def test_neither_batch_nor_order_changes_a_response(model):
    together = sample(model, PROMPTS, SAMPLING, uniforms(), pad_id=0)
    alone = [
        sample(model, [prompt], SAMPLING, row[None], pad_id=0)[0]
        for prompt, row in zip(PROMPTS, uniforms(), strict=True)
    ]
    backwards = sample(model, PROMPTS[::-1], SAMPLING, uniforms().flip(0), pad_id=0)[::-1]
    assert same(together, alone) and same(together, backwards)


def test_padding_with_a_stop_token_changes_nothing(model):
    expected = sample(model, PROMPTS, SAMPLING, uniforms(), pad_id=0)
    assert same(sample(model, PROMPTS, SAMPLING, uniforms(), pad_id=STOPS[0]), expected)


def test_a_stop_token_in_the_prompt_stops_nothing(model):
    prompts = [np.array([5, 3, 11, 5]), np.array([2])]
    found = sample(model, prompts, SAMPLING, uniforms(2), pad_id=5)
    expected = [by_hand(model, p, SAMPLING, u) for p, u in zip(prompts, uniforms(2), strict=True)]
    assert same(found, expected)


def test_rows_that_have_ended_leave_the_batch(model):
    sizes: list[int] = []
    hook = model.register_forward_pre_hook(
        lambda _, __, inputs: sizes.append(len(inputs["input_ids"])), with_kwargs=True
    )
    found = sample(model, PROMPTS, SAMPLING, uniforms(), pad_id=0)
    hook.remove()
    lengths = [len(response.ids) for response in found]
    assert sizes == [sum(n > step for n in lengths) for step in range(max(lengths))]
    assert sizes[-1] < len(PROMPTS)


def test_a_batch_ends_with_its_last_row(model):
    calls: list[int] = []
    hook = model.register_forward_pre_hook(lambda *_: calls.append(1))
    every = Sampling(max_new_tokens=10, stop_ids=tuple(range(20)))
    found = sample(model, PROMPTS, every, uniforms(), pad_id=0)
    hook.remove()
    assert len(calls) == 1
    assert [(len(r.ids), r.terminated) for r in found] == [(1, True)] * len(PROMPTS)


def test_the_length_limit_leaves_a_response_unterminated(model):
    never = Sampling(max_new_tokens=6, stop_ids=(19_999,))
    found = sample(model, PROMPTS, never, uniforms(), pad_id=0)
    assert [(len(r.ids), r.terminated) for r in found] == [(6, False)] * len(PROMPTS)


def test_a_stop_token_on_the_last_place_terminates(model):
    response = next(
        r for r in sample(model, PROMPTS, SAMPLING, uniforms(), pad_id=0) if r.terminated
    )
    limit = SAMPLING._replace(max_new_tokens=len(response.ids))
    again = sample(model, PROMPTS, limit, uniforms(), pad_id=0)
    assert response.ids.tolist() in [r.ids.tolist() for r in again if r.terminated]


def test_the_cold_limit_is_greedy_generation(model):
    greedy = Sampling(max_new_tokens=12, stop_ids=STOPS, temperature=1e-5)
    found = sample(model, PROMPTS, greedy, uniforms(tokens=12), pad_id=0)
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
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 3.0, -1.0]])
    edges = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert draw(logits, edges, temperature=0, top_p=1.0).tolist() == [1, 0]
    greedy, cold = (SAMPLING._replace(temperature=t) for t in (0.0, 1e-5))
    found = sample(model, PROMPTS, greedy, uniforms(), pad_id=0)
    assert same(found, sample(model, PROMPTS, cold, uniforms(), pad_id=0))


def test_each_row_may_have_a_limit_of_its_own(model):
    whole = sample(model, PROMPTS, SAMPLING, uniforms(), pad_id=0)
    limits = [1, 8, 3, 2, 8, 1, 5, 4]
    found = sample(model, PROMPTS, SAMPLING, uniforms(), pad_id=0, limits=limits)
    expected = [
        Response(r.ids[:limit], r.terminated and len(r.ids) <= limit)
        for r, limit in zip(whole, limits, strict=True)
    ]
    assert same(found, expected)
    assert not same(found, whole)


def test_nothing_of_a_generation_config_leaks_in(model):
    expected = sample(model, PROMPTS, SAMPLING, uniforms(), pad_id=0)
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
    assert same(sample(other, PROMPTS, SAMPLING, uniforms(), pad_id=0), expected)
