"""Findings from metrics made by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from denserl_cli.core.reporting.findings import findings
from denserl_cli.core.reporting.record import RunRecord, StageRecord
from tests.core.reporting.conftest import RM, MakeRecord, lines

RISING = [0.1 * k for k in range(10)]
LOCATED = ("location_segments", "location_reward_mean", "location_reward_std")


def found(record: RunRecord) -> list[tuple[str, str]]:
    return [(one.severity, one.what) for one in findings(record)]


def grown(factor: float, start: float = 100.0) -> list[float]:
    """Ten values, the last two of them `factor` times the first two."""
    return [start] * 5 + [start * factor] * 5


@pytest.mark.parametrize(
    ("metrics", "severity", "words"),
    [
        ({"response_length": grown(1.6), "dense_reward": RISING}, "serious",
         "The reward rises while the length explodes: responses went from 100 to 160 tokens."),
        ({"response_length": grown(1.6), "dense_reward": [1.0] * 5}, "warning",
         "Responses grew from 100 to 160 tokens"),
        ({"response_length": grown(0.4)}, "warning", "Responses were cut from 100 to 40 tokens."),
        ({"segments_per_response": grown(2.0, 24)}, "warning", "from 24.0 to 48.0"),
        ({"kl": grown(2, 60)}, "serious", "120 nats a response"),
        ({"kl": [9.0] * 6, "kl_per_token": [0.6] * 6}, "serious", "0.6 a token"),
        ({"kl": [-3.0] * 6}, "serious", "below zero"),
        ({"kl": [0.01] * 6}, "warning", "hardly moved"),
        ({"entropy": grown(0.2, 2.0)}, "warning", "collapsed from 2 to 0.4 nats a token"),
        ({"entropy": grown(2.5, 1.0)}, "warning", "rose from 1 to 2.5 nats a token"),
        ({"clipped_rewards": [0.6]}, "serious", "Most rewards are clipped: 60%"),
        ({"clipped_rewards": [0.2]}, "warning", "Many rewards are clipped: 20%"),
        ({"floored_segments": [0.02]}, "note", "2.0% of the segments"),
        ({"floored_segments": [0.2]}, "warning", "20.0% of the segments"),
        ({"terminated": [0.2]}, "warning", "only 20%"),
        ({"dense_reward": RISING[::-1]}, "warning", "did not rise: 0.85 early, 0.05 late"),
        ({"policy_clip_fraction": [0.4]}, "warning", "40% of the tokens"),
        ({"mismatch_kl": [0.03] * 6}, "serious", "is away from the trainer: kl 0.03"),
        ({"mismatch_kl": grown(20, 0.002)}, "serious", "drifts away"),
        ({"mismatch_kl": [0.001] * 6, "importance_capped": [0.1] * 6}, "warning", "10% of the"),
        ({"explained_variance": [-0.5] * 10}, "note", "explained variance -0.50"),
        ({"skipped_updates": [0, 3]}, "warning", "skipped 3 updates"),
        ({"true_reward": RISING[::-1], "dense_reward": RISING}, "serious", "exploits the reward"),
        ({"true_reward": [0, 0, 5, 5, 5, 5, 5, 5, 1, 1]}, "warning", "around iteration 4"),
        (dict(zip(LOCATED, ([[4]], [[2.0]], [[1.0]]), strict=True)), "warning", "mean 2.00"),
        (dict(zip(LOCATED, ([[4]], [[0.0]], [[0.1]]), strict=True)), "warning", "std 0.10"),
    ],
)  # fmt: skip
def test_a_warning_has_a_text_and_advice(
    ppo: MakeRecord, metrics: dict[str, Any], severity: str, words: str
):
    (one,) = findings(ppo(**metrics))
    assert one.severity == severity and words.lower() in one.what.lower()
    assert len(one.advice) > 20


def test_a_good_run_has_none(ppo: MakeRecord):
    good = {
        "response_length": [100, 110, 100, 105, 98, 120, 110, 100, 105, 100],
        "segments_per_response": [20.0] * 10,
        "kl": [0.0, *range(1, 10)],
        "entropy": [1.0, 0.9, 0.9, 0.9, 0.8, 0.8, 0.7, 0.7, 0.7, 0.6],
        "clipped_rewards": [0.0] * 10,
        "floored_segments": [0.0] * 10,
        "terminated": [0.9] * 10,
        "dense_reward": RISING,
        "true_reward": RISING,
    }
    assert found(ppo(**good)) == []


@pytest.mark.parametrize("values", [[], [None] * 6, ["x"] * 6, [True] * 6, [float("nan")] * 6])
def test_metrics_that_are_not_numbers_give_no_finding(ppo: MakeRecord, values: list[Any]):
    names = ("kl", "entropy", "response_length", "dense_reward", "clipped_rewards", "true_reward",
             "location_segments")  # fmt: skip
    assert found(ppo(**dict.fromkeys(names, values or [None]))) == []


def test_few_iterations_show_no_trend(ppo: MakeRecord):
    assert found(ppo(response_length=[1, 10, 100, 1000], kl=[0.0] * 4, entropy=[9, 1, 1, 1])) == []


def test_summed_segment_rewards_are_named_as_the_reason(ppo: MakeRecord):
    more = {"segments_per_response": grown(2.0, 24)}
    assert "surprises the reference" in findings(ppo({"segment_total": "sum"}, **more))[0].what
    assert findings(ppo({"segment_total": "sum"}, **more))[0].severity == "serious"
    assert "segment_total" not in findings(ppo({"segment_total": "mean"}, **more))[0].advice


def test_kl_settings_are_held_against_the_kl(ppo: MakeRecord):
    kl = {"kl": [5.0] * 6, "kl_per_token": [0.05] * 6}
    assert "passed ppo.kl_limit (4)" in findings(ppo({"kl_limit": 4.0}, **kl))[0].what
    assert "asks for 0.2" in findings(ppo({"kl_target": 0.2}, **kl))[0].what
    assert found(ppo({"kl_limit": 6.0, "kl_target": 0.04}, **kl)) == []


def test_a_normaliser_of_last_segments_fits_no_others():
    located = dict(zip(LOCATED, ([[4]], [[2.0]], [[1.0]]), strict=True))
    for kind, told in (("global", 1), ("last", 0), ("none", 0)):
        record = RunRecord("run", Path("run"), recipe={"normalizer": {"kind": kind}},
                           stages={"train-ppo": StageRecord(finished=True)},
                           metrics={"train-ppo": lines("train-ppo", **located)})  # fmt: skip
        assert len(found(record)) == told


def reward_model(bins: list[tuple[int | None, int | None, int, float]], **last: float) -> RunRecord:
    metrics = lines(RM, accuracy=[last.pop("seen", 0.8)] * 6)
    metrics[-1] |= last
    names = ("shortest", "longest", "pairs", "accuracy")
    return RunRecord(
        "run",
        Path("run"),
        stages={RM: StageRecord(finished=True)},
        metrics={RM: metrics},
        accuracy_by_length=[dict(zip(names, one, strict=True)) for one in bins],
    )


def test_a_reward_model_is_held_against_length_and_chance():
    barely = found(reward_model([], eval_accuracy=0.72, eval_longer_accuracy=0.7))
    assert barely[0][0] == "serious" and "'prefer the longer response' on 70.0%" in barely[0][1]
    assert found(reward_model([], eval_accuracy=0.76, eval_longer_accuracy=0.7)) == []
    assert "than chance" in found(reward_model([], eval_accuracy=0.55))[0][1]
    shorter = [(None, -1, 75, 0.75), (0, 0, 5, 0.75), (1, None, 20, 0.75)]
    words = found(reward_model(shorter, eval_accuracy=0.75, eval_longer_accuracy=0.2))[0][1]
    assert "'prefer the shorter response' on 75.0%" in words


def test_a_reward_model_that_is_worse_than_chance_does_not_overfit():
    few = [(0, 0, 10, 0.2)]
    ((severity, words),) = found(reward_model(few, seen=0.44, eval_accuracy=0.2))
    assert severity == "serious"
    assert "right on 20.0% of only 10 held-out pairs, worse than chance" in words
    many = found(reward_model([(0, 0, 60, 0.2)], seen=0.44, eval_accuracy=0.2))
    assert "of the held-out pairs, worse than chance" in many[0][1]
    both = [words for _, words in found(reward_model(few, seen=0.9, eval_accuracy=0.2))]
    assert len(both) == 2 and "overfits" in both[1]


def test_a_reward_model_whose_scores_depend_on_length():
    bins = [(None, -10, 10, 0.2), (-9, -1, 30, 0.4), (0, 0, 9, 0.0), (1, None, 50, 0.9)]
    ((severity, words),) = found(reward_model(bins, eval_accuracy=0.8))
    assert severity == "warning"
    assert "shorter one the reward model is right on 35%" in words and "on 90%" in words
    assert found(reward_model([(None, -1, 10, 0.7), (1, None, 9, 0.8)], eval_accuracy=0.8)) == []


def test_a_reward_model_that_overfits():
    assert "overfits" in found(reward_model([], eval_accuracy=0.62))[0][1]


def test_an_unfinished_stage_is_a_note(ppo: MakeRecord):
    record = RunRecord("run", Path("run"), stages={RM: StageRecord(finished=False)},
                       metrics={RM: lines(RM, loss=[0.7, 0.6])})  # fmt: skip
    ((severity, words),) = found(record)
    assert severity == "note" and "after step 2" in words
