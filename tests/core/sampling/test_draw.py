"""Drawing tokens: exact inversion, noise that belongs to a response."""

from __future__ import annotations

import pytest
import torch

from denserl_cli.core.sampling.draw import draw, noise


def drawn(probabilities: list[float], count: int = 10_000, **settings: float) -> list[int]:
    """How often each token comes on a regular grid of uniforms."""
    grid = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    logits = torch.tensor(probabilities).log().expand(count, -1)
    tokens = draw(logits, grid, **{"temperature": 1.0, "top_p": 1.0, **settings}).ids
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
    assert draw(logits, edges, temperature=1.0, top_p=1.0).ids.tolist() == [1, 1, 3, 3]
    underflown = torch.tensor([[0.0, *[-200.0] * 50_000]])
    last = draw(underflown, edges[2:3], temperature=1.0, top_p=1.0)
    assert last.ids.tolist() == [0]


@pytest.mark.parametrize("vocabulary", [5, 255, 256, 257, 1000])
def test_draw_passes_the_cumulative_distribution_where_it_was_asked(vocabulary: int):
    generator = torch.Generator().manual_seed(vocabulary)
    logits = 4 * torch.randn(500, vocabulary, generator=generator)
    logits[:, vocabulary // 3 : vocabulary // 2] = -float("inf")
    uniform = torch.rand(500, dtype=torch.float64, generator=generator)
    cumulative = logits.softmax(1).double().cumsum(1)
    plain = (cumulative > uniform[:, None] * cumulative[:, -1:]).int().argmax(1)
    assert draw(logits, uniform, temperature=1.0, top_p=1.0).ids.tolist() == plain.tolist()


def test_temperature_0_takes_the_likeliest_token():
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 3.0, -1.0]])
    edges = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    found = draw(logits, edges, temperature=0, top_p=1.0)
    assert (found.ids.tolist(), found.logprobs.tolist()) == ([1, 0], [0.0, 0.0])


def test_draw_says_how_likely_its_tokens_were():
    logits = torch.tensor([0.5, 0.125, 0.25, 0.125]).log().expand(3, -1)
    uniform = torch.tensor([0.1, 0.55, 0.7], dtype=torch.float64)
    found = draw(logits, uniform, temperature=1.0, top_p=1.0)
    assert found.logprobs.exp().tolist() == pytest.approx([0.5, 0.125, 0.25])
    tempered = draw(logits, uniform, temperature=0.5, top_p=1.0)  # 16, 1, 4, 1 of 22
    assert tempered.logprobs.exp().tolist() == pytest.approx([16 / 22, 16 / 22, 1 / 22 * 16])
    nucleus = draw(logits, uniform, temperature=1.0, top_p=0.7)
    assert nucleus.ids.tolist() == [0, 0, 2]
    assert nucleus.logprobs.exp().tolist() == pytest.approx([2 / 3, 2 / 3, 1 / 3])


def test_noise_depends_on_the_key_alone():
    keys = [(1, 2, 3, 0), (1, 2, 3, 1), (1, 3, 3, 0), (2, 2, 3, 0), (1, 2, 4, 0)]
    rows = noise(keys, 6)
    assert rows.dtype == torch.float64 and rows.shape == (5, 6)
    assert len({tuple(row) for row in rows.tolist()}) == 5
    assert torch.equal(noise(keys[::-1], 6).flip(0), rows)
    assert torch.equal(noise(keys[2:3], 4)[0], rows[2, :4])
    assert (rows >= 0).all() and (rows < 1).all()
