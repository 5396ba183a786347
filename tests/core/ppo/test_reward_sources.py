"""The sources of rewards of a recipe, from the models that they read to each token's reward."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from denserl_cli.core.errors import DenserlError
from denserl_cli.core.normalizer import LocationNormalizer
from denserl_cli.core.observer import Observer
from denserl_cli.core.ppo.reward_sources import RewardSources, broken_promises
from denserl_cli.core.ppo.rollout import Rollout
from denserl_cli.core.recipe.schema import RewardSource
from denserl_cli.core.runs.folder import RunFolder
from denserl_cli.core.scoring.loading import load_scorer
from denserl_cli.core.scoring.resolve import prepare
from denserl_cli.core.stages.run import run_stage
from tests import tiny
from tests.fakes import RecordingObserver

RECORDED = Path(__file__).with_name("default_rewards.json")


class Words:
    def batch_decode(self, rows: Any, skip_special_tokens: bool = False) -> list[str]:
        return [" ".join(map(str, row)) for row in rows]


def test_the_default_gives_the_bytes_that_it_gave_before_there_were_others(rollout: Rollout):
    """Recorded with the version in which the reward model's values were the only source."""
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))
    normalizers = (None, LocationNormalizer(0.2, 0.3, 0.1, 1.5))
    ways = product(("sum", "mean"), ("even", "repeat", "end"), normalizers)
    for expected, (total, how, normalizer) in zip(recorded, ways, strict=True):
        recipe = tiny.recipe(
            f"ppo.segment_total={total}",
            f"ppo.interpolation={how}",
            "ppo.missing_eos_penalty=-0.5",
            "ppo.reward_clip=1.2",
        )
        found = RewardSources(recipe, None, {"": normalizer})([], rollout)
        assert [value.hex() for value in found.tokens.flatten().tolist()] == expected
        assert found.totals == {}


def lines_of(folder: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["stage"] == "train-ppo"]


def trained(folder: Path, rewards: str, *settings: str) -> tuple[list[dict[str, Any]], list[str]]:
    """The metrics and notices of a training with these sources."""
    observer = RecordingObserver()
    recipe = tiny.recipe(f"ppo.rewards={rewards}", "ppo.iterations=2", *settings)
    run_stage("train-ppo", recipe, folder, "start", observer)
    return lines_of(folder), list(observer.notices)


BUILT_IN = ("differences", "attention", "shapley", "score")


@pytest.mark.parametrize("source", BUILT_IN)
def test_a_source_of_the_runs_reward_model_trains_a_policy(source: str, scored: Path):
    """None of them needs a normaliser, and each keeps its promise."""
    (scored / "reward_model" / "normalizer.json").unlink()
    lines, notices = trained(scored, f"[{source}]", "ppo.segment_total=mean")
    assert not [one for one in notices if "add up" in one]
    assert lines[-1]["dense_reward"] != 0 and "eval_rm_score" in lines[-1]
    assert (scored / "policy_best").is_dir()
    if source in ("attention", "score"):  # all of the score, wherever it goes
        assert lines[1]["dense_reward"] == pytest.approx(lines[1]["rm_score"], rel=1e-4)


def test_two_reward_models_and_a_policy_that_is_the_reference(scored: Path, tmp_path: Path):
    """A second reward model that is a copy of the first gives its rewards once more."""
    other = shutil.copytree(scored / "reward_model", tmp_path / "other")
    policy = shutil.copytree(scored / "sandbox" / "model", tmp_path / "policy")
    both = (
        f"[{{source: values, weight: 0.5}}, {{source: values, model: {other}, weight: 0.5}}, "
        f"{{source: log_ratio, model: {policy}}}]"
    )
    alone = shutil.copytree(scored, tmp_path / "alone")
    found, _ = trained(scored, both)
    expected, _ = trained(alone, "[values]")
    for one, other_line in zip(found[1:], expected[1:], strict=True):
        assert one["dense_reward"] == pytest.approx(other_line["dense_reward"], rel=1e-5)
        assert one["reward_log_ratio"] == 0  # exactly
        assert "reward_values" in one
    text = (policy / "model.safetensors").read_bytes()
    assert text  # the copy is read, not written


def test_a_model_of_whole_responses_serves_segments(scored: Path, tmp_path: Path):
    """Its value at the last segment's end is that of the whole response."""
    other = shutil.copytree(scored / "reward_model", tmp_path / "other")
    (other / "denserl.json").unlink()
    fresh = shutil.copytree(scored, tmp_path / "fresh")
    rewards = f"[{{source: differences, model: {other}}}, {{source: score, model: {other}}}]"
    lines, notices = trained(scored, rewards)
    assert not [one for one in notices if "add up" in one]
    assert lines[1]["reward_differences"] != 0 and "rm_score" not in lines[1]
    with pytest.raises(DenserlError, match="rewards whole responses, so it has no values"):
        trained(fresh, f"[{{source: values, model: {other}}}]")


def test_a_reward_model_for_other_segments_is_refused(scored: Path, tmp_path: Path):
    other = shutil.copytree(scored / "reward_model", tmp_path / "other")
    record = json.loads((other / "denserl.json").read_text())
    (other / "denserl.json").write_text(json.dumps({**record, "cutoff": 3.5}))
    with pytest.raises(DenserlError, match=r"trained for cutoff 3.5, not for the recipe's"):
        trained(scored, f"[values, {{source: values, model: {other}}}]")


def test_a_clip_that_bites_is_named_once(scored: Path):
    _, notices = trained(scored, "[attention]", "ppo.reward_clip=1e-6")
    broken = [one for one in notices if "add up" in one]
    assert len(broken) == 1
    assert "ppo.reward_clip 1e-06" in broken[0] and "attention" in broken[0]


@pytest.fixture
def measured(scored: Path) -> Callable[..., tuple[RewardSources, Rollout]]:
    """Sources, and what the models of the tiny run measure for them on four responses."""

    def measure(rewards: str, granularity: str = "") -> tuple[RewardSources, Rollout]:
        from denserl_cli.core.data.batches import collate_sequences, padded
        from denserl_cli.core.models.lora import load_reference

        recipe = tiny.recipe(f"ppo.rewards={rewards}", "ppo.rollout.micro_batch_size=3")
        run = RunFolder(scored, recipe)
        setup = prepare(recipe, run, Observer(), reward_model=True)
        sources = RewardSources(setup.recipe, setup.tokenizer, {"": None})
        texts = ["the cat sat", "w", "a b c d e f g h i j k l", "dog dog"]
        rows = [setup.tokenizer(t)["input_ids"] for t in texts]
        ids = [torch.tensor([*(r or [5]), setup.chat.terminator_id]).numpy() for r in rows]
        prompts = [torch.tensor([4, 5, 6]).numpy()] * len(ids)
        batch = collate_sequences(prompts, ids, setup.chat.pad_id)
        reference = load_reference(setup.recipe)
        scorer = load_scorer(setup, run, Observer(), reference=reference, asked=sources.asked)
        found = scorer(batch)
        zeros = torch.zeros(batch.response_mask.shape)
        assert torch.equal(batch.responses * batch.response_mask, padded(ids))
        return sources, Rollout(
            prompts=prompts,
            responses=ids,
            terminated=torch.ones(len(ids), dtype=torch.bool),
            response_mask=batch.response_mask,
            logprobs=zeros,
            policy_entropy=zeros,
            reference_logprobs=found.reference_logprobs,
            entropy=found.entropy,
            values=zeros,
            token_values=found.token_values,
            ends=found.ends,
            measured=found.measured,
        )

    return measure


def test_each_promise_is_kept(measured: Callable[..., Any]):
    sources, rollout = measured("[differences, attention, shapley, score, values]")
    shares = {s.source.source: s([], rollout) for s in sources.sources}
    for name in BUILT_IN:
        share = shares[name]
        torch.testing.assert_close(share.tokens.sum(1), share.promise, rtol=1e-4, atol=1e-4)
    assert shares["values"].law is None
    whole = shares["score"].total
    torch.testing.assert_close(shares["attention"].total, whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        shares["shapley"].total, whole - rollout.measured["", "empty_score"], rtol=1e-4, atol=1e-4
    )


def test_a_broken_promise_names_the_response(measured: Callable[..., Any]):
    sources, rollout = measured("[attention]")
    key = ("", "attention")
    torn = rollout._replace(measured={**rollout.measured, key: 2 * rollout.measured[key]})
    (broken,) = broken_promises(sources([], torn).shares, 10.0)
    assert "attention do not add up to its score" in broken and "response 0" in broken


def own(monkeypatch: pytest.MonkeyPatch, function: Any, **fields: Any) -> RewardSources:
    monkeypatch.setitem(sys.modules, "given", SimpleNamespace(mine=function))
    recipe = tiny.recipe()
    rewards = (RewardSource("values", 0.0), RewardSource("python:given.mine", **fields))
    recipe = replace(recipe, ppo=replace(recipe.ppo, rewards=rewards))
    return RewardSources(recipe, Words(), {"": None})


def prompts_of(rollout: Rollout) -> list[Any]:
    return [
        SimpleNamespace(messages=[{"role": "user", "content": "p"}], origin=f"a:{n}", row={})
        for n in range(len(rollout.responses))
    ]


def test_a_function_sees_tensors(rollout: Rollout, monkeypatch: pytest.MonkeyPatch):
    def mine(tokens, mask, ends, groups, token_values, score, reference_logprobs, responses):
        assert tokens.shape == mask.shape == ends.shape == token_values.shape == groups.shape
        assert len(responses) == len(tokens) == len(score)
        return token_values + reference_logprobs + (groups >= 0) * 0

    found = own(monkeypatch, mine)(prompts_of(rollout), rollout)
    expected = (rollout.token_values + rollout.reference_logprobs) * rollout.response_mask
    torch.testing.assert_close(found.totals["reward_mine"], expected.sum(1))

    def halves(score):
        return score / 2

    halves.conserves = "score"
    found = own(monkeypatch, halves)(prompts_of(rollout), rollout)
    (broken,) = broken_promises(found.shares, 1e9)
    assert "mine do not add up to its score" in broken


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((6, 5), r"shape \(6, 5\) for 6 responses; row 0, for a:0, has \d segments and 2 tokens"),
        ((6, 6, 1), r"shape \(6, 6, 1\)"),
        ((5,), r"shape \(5,\) for 6 responses"),
    ],
)
def test_a_tensor_of_a_wrong_shape_names_row_and_shape(
    shape: tuple[int, ...], message: str, rollout: Rollout, monkeypatch: pytest.MonkeyPatch
):
    def mine(token_values):
        return torch.zeros(shape)

    with pytest.raises(DenserlError, match=message):
        own(monkeypatch, mine)(prompts_of(rollout), rollout)

    def rows(token_values):
        return [torch.zeros(2, 2), *(torch.zeros(n) for n in (6, 1, 4, 6, 3))]

    with pytest.raises(DenserlError, match=r"for a:0 has shape \(2, 2\)"):
        own(monkeypatch, rows)(prompts_of(rollout), rollout)


def test_what_the_run_does_not_measure_is_refused_before_it_starts(
    monkeypatch: pytest.MonkeyPatch,
):
    def mine(model_logprobs):
        return model_logprobs

    with pytest.raises(DenserlError, match="mine asks for model_logprobs"):
        own(monkeypatch, mine)

    def text(responses):
        return responses

    with pytest.raises(DenserlError, match="a model of its own but asks nothing of it"):
        own(monkeypatch, text, model="somewhere")
    text.conserves = "everything"
    with pytest.raises(DenserlError, match="conserves 'everything'"):
        own(monkeypatch, text)
    monkeypatch.setitem(sys.modules, "given", SimpleNamespace(mine=lambda score: score))
    recipe = tiny.recipe()
    alone = replace(recipe, ppo=replace(recipe.ppo, rewards=(RewardSource("python:given.mine"),)))
    with pytest.raises(DenserlError, match="asks for score, which this run does not measure"):
        RewardSources(alone, Words())
