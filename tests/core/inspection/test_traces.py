"""Responses cut after the models have read them: as PPO and the normaliser would."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from denserl_cli.core.errors import DenserlError
from denserl_cli.core.inspection.statistics import CutStatistics, at, statistics
from denserl_cli.core.inspection.traces import Cut, SegmentedResponse, Trace, in_pairs
from denserl_cli.core.normalizer import LocationNormalizer
from denserl_cli.core.ppo.rewards import spread_rewards
from tests import tiny

NORMALIZER = LocationNormalizer(0.5, 0.2, 0.1, 2.0)


def trace(entropy: list[float], *, terminated: bool = True, side: str = "") -> Trace:
    """Words w0 w1 … with these entropies; the value of token j is j."""
    count = len(entropy)
    texts = [f" w{j}" for j in range(count)]
    values = np.arange(count, dtype=np.float32)
    ends = np.arange(count) % 2 == 1
    return Trace("t", side, "p", terminated, texts, ends, np.array(entropy, np.float32), values)


def cut(cutoff: float | None = 1.0, *settings: str) -> Cut:
    recipe = tiny.recipe(f"segmentation.cutoff={cutoff}", "ppo.segment_total=sum", *settings)
    return Cut.of(recipe, NORMALIZER)


def test_segments_rewards_and_score_by_hand():
    response = cut()(trace([0.5, 2.0, 0.5, 0.5, 9.0]))
    assert [(s.start, s.end, s.text) for s in response.segments] == [
        (0, 1, " w0 w1"),
        (2, 3, " w2 w3"),
    ]
    assert [s.value for s in response.segments] == [1.0, 3.0]
    assert response.score == 2.0
    for k, s in enumerate(response.segments, 1):
        normal = (s.value - NORMALIZER.mean(k / 2)) / NORMALIZER.std(k / 2)
        assert s.reward == pytest.approx(normal)
        assert s.per_token == pytest.approx(normal / 2)
    assert response.segments[1].entropy == 0.5


@pytest.mark.parametrize("interpolation", ["even", "repeat", "end"])
@pytest.mark.parametrize("total", ["sum", "mean"])
def test_per_token_is_what_ppo_spreads(interpolation: str, total: str):
    settings = [
        f"ppo.interpolation={interpolation}",
        f"ppo.segment_total={total}",
        "ppo.length_normalize=true",
        "ppo.reward_clip=0.2",
    ]
    one, how = trace([0.5, 2.0, 0.5, 3.0, 0.1, 0.1, 0.0]), cut(1.0, *settings)
    ends = how.ends(one)
    spread = spread_rewards(
        torch.from_numpy(one.values)[None],
        ends,
        torch.ones_like(ends),
        normalizer=NORMALIZER,
        interpolation=interpolation,
        segment_total=total,
        length_normalize=True,
        clip=0.2,
    )[0]
    assert [s.per_token for s in how(one).segments] == pytest.approx(spread[ends[0]].tolist())


@pytest.mark.parametrize("weight", [0.25, 3.0])
def test_per_token_has_the_reward_models_weight_before_the_clip(weight: float):
    one = trace([0.5, 2.0, 0.5, 0.5, 9.0])
    own = "{source: 'python:tests.reward_functions.variety'}"
    plain = [s.per_token for s in cut(1.0, "ppo.reward_clip=99")(one).segments]
    both = f"ppo.rewards=[{{source: values, weight: {weight}}}, {own}]"
    weighed = cut(1.0, both, "ppo.reward_clip=1")
    expected = np.clip(weight * np.array(plain), -1, 1)
    assert [s.per_token for s in weighed(one).segments] == pytest.approx(expected.tolist())
    without = cut(1.0, f"ppo.rewards=[{own}]")(one).segments
    assert [s.per_token for s in without] == [None, None]
    assert None not in [s.reward for s in without]


def test_without_a_cutoff_the_segments_of_the_recipe_stand():
    token = Cut.of(tiny.recipe("segmentation={granularity: token, cutoff: null}"), None)
    response = token(trace([9.0, 0.0, 9.0, 0.0]))
    assert [(s.start, s.end) for s in response.segments] == [(0, 1), (2, 3)]
    assert token.description == "every token"


@pytest.mark.parametrize(
    ("rule", "at_peaks"), [("quantile, quantile: 0.5", True), ("fixed", False)]
)
def test_a_quantile_cuts_at_peaks_as_a_cutoff_does(rule: str, at_peaks: bool):
    made = tiny.recipe(f"segmentation={{granularity: segment, cut: {rule}, cutoff: null}}")
    assert Cut.of(made, None).at_peaks == at_peaks
    assert cut(1.0).at_peaks


def test_a_response_that_was_cut_ends_its_last_segment_at_its_last_token():
    response = cut()(trace([0.5, 2.0, 0.5], terminated=False))
    assert [(s.start, s.end) for s in response.segments] == [(0, 1), (2, 2)]
    assert response.segments[-1].entropy is None and not response.terminated


def test_without_a_normaliser_ppo_gives_raw_rewards_only_where_it_wants_none():
    one = trace([0.5, 2.0, 0.5, 0.5])
    recipe = tiny.recipe("ppo.segment_total=sum")
    waiting = Cut.of(recipe, None)(one)
    assert {(s.reward, s.per_token) for s in waiting.segments} == {(None, None)}
    none = replace(recipe, normalizer=replace(recipe.normalizer, kind="none"))
    assert [s.per_token for s in Cut.of(none, None)(one).segments] == [0.5, 2.0]


def test_pairs_stand_together():
    made = [cut()(trace([1.0, 1.0], side=side)) for side in ("chosen", "rejected", "", "chosen")]
    groups: list[list[SegmentedResponse]] = in_pairs(made)
    assert [[r.side for r in group] for group in groups] == [
        ["chosen", "rejected"],
        [""],
        ["chosen"],
    ]


def test_statistics_count_lengths_and_segments():
    traces = [trace([0.5, 2.0, 0.5, 3.0, 0.5, 9.0]), trace([0.2, 0.3, 9.0])]
    low, own, high = statistics(cut(1.0), traces, [2.5, 0.1])
    assert [one.cutoff for one in (low, own, high)] == [0.1, 1.0, 2.5]
    assert own.lengths.tolist() == [2, 2, 1, 2] and own.counts.tolist() == [3, 1]
    document = own.document()
    assert document["lengths"] == {1: 1, 2: 3} and document["counts"] == {1: 1, 3: 1}
    assert (document["segments"], document["count_mean"], document["length_mean"]) == (4, 2.0, 1.75)
    assert (document["length_max"], document["single_tokens"]) == (2, 0.25)
    assert high.lengths.tolist() == [4, 1, 2]
    assert low.lengths.tolist() == [1] * 7


def test_statistics_choose_cutoffs_that_give_short_and_long_segments():
    rng = np.random.default_rng(0)
    traces = [trace(rng.exponential(1.0, 200).tolist()) for _ in range(20)]
    found = statistics(cut(1.0), traces)
    means = [one.metrics()["length_mean"] for one in found]
    assert means == sorted(means) and means[0] < 2.5 and means[-1] > 14
    assert 1.0 in [one.cutoff for one in found]


def test_statistics_need_entropies():
    blind = replace(trace([1.0, 1.0]), entropy=None)
    with pytest.raises(DenserlError, match="needs entropies"):
        statistics(cut(), [blind], [1.0])


def test_a_cut_can_be_moved():
    one = trace([0.5, 2.0, 0.5, 3.0, 0.5, 9.0])
    assert len(at(cut(1.0), 2.5)(one).segments) == 2
    assert CutStatistics.of(at(cut(1.0), 9.0), [one]).counts.tolist() == [1]
