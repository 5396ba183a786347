"""A rollout holds what each model says about each token."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from denserl_cli.core.engine.frozen import OffloadedModel
from denserl_cli.core.ppo.metrics import rollout_metrics
from denserl_cli.core.ppo.rollout import Collector, Rollout, evaluating
from denserl_cli.core.recipe.schema import PPOConfig, RolloutConfig, SegmentationConfig
from denserl_cli.core.sampling.base import Response, Sampling
from denserl_cli.core.sampling.sampler import takes_sampled_logprobs
from denserl_cli.core.scoring.scorer import Scorer
from tests import tiny
from tests.core.ppo.conftest import PROMPTS

SAMPLING = Sampling(max_new_tokens=8, stop_ids=(5, 11), temperature=0.7)
KEYS = [(0, 1, row, 0) for row in range(len(PROMPTS))]
CUTOFF = 2.0


def collector(micro_batch_size: int = 2, sampling: Sampling = SAMPLING) -> Collector:
    policy = tiny.causal_lm(0)
    return Collector(
        sampler=tiny.sampler(policy, rows=micro_batch_size),
        policy=tiny.frozen(policy),
        critic=tiny.frozen(tiny.scalar_model(1)),
        scorer=Scorer(
            SegmentationConfig(cutoff=CUTOFF),
            reference=tiny.frozen(tiny.causal_lm(2)),
            reward_model=tiny.frozen(tiny.scalar_model(3)),
        ),
        sampling=sampling,
        micro_batch_size=micro_batch_size,
        pad_id=5,
    )


@pytest.fixture(scope="module")
def collect() -> Collector:
    return collector()


@pytest.fixture(scope="module")
def collected(collect: Collector) -> Rollout:
    return collect.collect(PROMPTS, KEYS)


def test_offloaded_models_are_on_the_device_only_while_they_score(collected: Rollout, monkeypatch):
    made, seen = collector(), []
    cpu = torch.device("cpu")
    for name in ("reference", "reward_model"):
        whole = getattr(made.scorer, name).model
        setattr(made.scorer, name, OffloadedModel(whole, torch.float32, cpu))
    weight = made.scorer.reward_model.model.score.weight
    kept = weight.data_ptr()
    for owner, name in ((made.sampler, "sample"), (made, "score")):
        real = getattr(owner, name)

        def watched(*args, real=real, **options):
            seen.append(weight.data_ptr() == kept)
            return real(*args, **options)

        monkeypatch.setattr(owner, name, watched)
    again = made.collect(PROMPTS, KEYS)
    assert seen == [True, False] and weight.data_ptr() == kept
    assert torch.equal(again.token_values, collected.token_values)
    assert torch.equal(again.reference_logprobs, collected.reference_logprobs)


def logits(model, prompt: np.ndarray, response: np.ndarray) -> torch.Tensor:
    """(T + 1, V): before each response token and after the last."""
    ids = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))[None]
    return model(ids).logits[0, len(prompt) - 1 :].detach()


def token_scores(model, prompt: np.ndarray, response: np.ndarray) -> torch.Tensor:
    """(T + 1,): the scalar head before each response token and after the last."""
    ids = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))[None]
    states = model.model(ids).last_hidden_state[0, len(prompt) - 1 :]
    return model.score(states)[:, 0].detach()


def rows(rollout: Rollout):
    for row, (prompt, response) in enumerate(zip(rollout.prompts, rollout.responses, strict=True)):
        yield row, len(response), prompt, response


def test_shapes_and_masks(collected: Rollout):
    lengths = [len(response) for response in collected.responses]
    shape = (len(PROMPTS), max(lengths))
    mask = collected.response_mask
    assert mask.dtype == collected.ends.dtype == torch.bool
    assert mask.tolist() == [[column < n for column in range(max(lengths))] for n in lengths]
    assert len(set(lengths)) > 1
    for name in ("logprobs", "reference_logprobs", "entropy", "values", "token_values", "ends"):
        values = getattr(collected, name)
        assert values.shape == shape, name
        assert not values[~mask].any(), name
    assert all(a is b for a, b in zip(collected.prompts, PROMPTS, strict=True))
    stopped = [int(response[-1]) in SAMPLING.stop_ids for response in collected.responses]
    assert collected.terminated.tolist() == stopped
    assert set(stopped) == {True, False}


def test_logprobs_are_those_of_the_distribution_that_was_sampled(
    collect: Collector, collected: Rollout
):
    for name, model in (
        ("logprobs", collect.policy.model),
        ("reference_logprobs", collect.scorer.reference.model),
    ):
        for row, count, prompt, response in rows(collected):
            tempered = (logits(model, prompt, response)[:-1] / 0.7).log_softmax(-1)
            expected = tempered.gather(1, torch.from_numpy(response).long()[:, None])[:, 0]
            found = getattr(collected, name)[row, :count]
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_entropies_are_the_references_after_each_token_at_temperature_1(
    collect: Collector, collected: Rollout
):
    for row, count, prompt, response in rows(collected):
        after = logits(collect.scorer.reference.model, prompt, response)[1:].log_softmax(-1)
        expected = -(after.exp() * after).sum(-1)
        found = collected.entropy[row, :count]
        torch.testing.assert_close(found[:-1], expected[:-1], rtol=0, atol=1e-5)
        closing = count - 2 if collected.terminated[row] else count - 1
        ends = {j for j in range(closing) if expected[j] > CUTOFF} | {max(closing, 0)}
        assert torch.nonzero(collected.ends[row])[:, 0].tolist() == sorted(ends)


def test_the_critic_is_read_before_a_token_and_the_reward_model_at_it(
    collect: Collector, collected: Rollout
):
    for row, count, prompt, response in rows(collected):
        before = token_scores(collect.critic.model, prompt, response)[:-1]
        at = token_scores(collect.scorer.reward_model.model, prompt, response)[1:]
        torch.testing.assert_close(collected.values[row, :count], before, rtol=0, atol=1e-5)
        torch.testing.assert_close(collected.token_values[row, :count], at, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [1, 4, 6])
def test_the_micro_batch_size_does_not_matter(size: int, collected: Rollout):
    other = collector(size).collect(PROMPTS, KEYS)
    for name, expected in collected._asdict().items():
        found = getattr(other, name)
        if name in ("prompts", "responses"):
            assert [ids.tolist() for ids in found] == [ids.tolist() for ids in expected], name
        else:
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5, msg=name)


def test_every_response_has_the_noise_of_its_key(collect: Collector, collected: Rollout):
    (alone,) = collect.sampler.sample(PROMPTS[3:4], KEYS[3:4], SAMPLING)
    assert alone.ids.tolist() == collected.responses[3].tolist()


def test_a_truncated_response_ends_its_last_segment_on_its_last_token(collect: Collector):
    ids = np.array([3, 4, 6], np.int32)
    certain = np.zeros(3, np.float32)
    responses = [Response(ids, ended, certain) for ended in (True, False)]
    scored = collect.score(PROMPTS[:2], responses)
    assert scored.ends[0, 1:].tolist() == [True, False]
    assert scored.ends[1, 2].item() is True
    assert scored.response_mask.all()


def test_progress_counts_responses(collect: Collector):
    counts: list[int] = []
    collect.collect(PROMPTS[:5], KEYS[:5], progress=counts.append)
    assert sum(counts) == 5 and all(counts)


def test_models_are_in_evaluation_mode_only_meanwhile(collect: Collector):
    collect.policy.model.train()
    seen: list[bool] = []

    def stop(_: int) -> None:
        seen.append(collect.policy.model.training)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect.collect(PROMPTS, KEYS, progress=stop)
    assert seen == [False]
    assert collect.policy.model.training and not collect.critic.model.training
    collect.policy.model.eval()
    with evaluating(collect.policy.model):
        assert not collect.policy.model.training


def test_log_probabilities_of_the_sampler_are_those_of_a_pass(collected: Rollout, monkeypatch):
    made = collector()
    made.sampled_logprobs = True
    calls: list[str] = []
    monkeypatch.setattr(type(made.policy), "__call__", lambda self, function, *a, **o: (
        calls.append(function.__name__) if self is made.policy else None,
        function(self.model, *a, **o),
    )[1])  # fmt: skip
    found = made.collect(PROMPTS, KEYS)
    assert calls == []
    for name in ("logprobs", "policy_entropy"):
        expected = getattr(collected, name)
        torch.testing.assert_close(getattr(found, name), expected, rtol=0, atol=1e-5)


def test_an_entropy_that_nobody_knows_is_left_out(monkeypatch):
    made = collector()
    made.sampled_logprobs = True
    sample = made.sampler.sample
    monkeypatch.setattr(made.sampler, "sample", lambda *given, **options: [
        response._replace(entropy=None) for response in sample(*given, **options)
    ])  # fmt: skip
    found = made.collect(PROMPTS, KEYS)
    assert found.policy_entropy is None
    assert "entropy" not in rollout_metrics(found, "sum")
    made.sampled_logprobs = False
    assert "entropy" in rollout_metrics(made.collect(PROMPTS, KEYS), "sum")


@pytest.mark.parametrize(
    ("settings", "top_p", "epochs", "taken"),
    [
        ("auto", 1.0, 1, True),
        ("auto", 0.9, 1, False),
        ("auto", 1.0, 2, False),
        ("sampled", 0.9, 2, True),
        ("recomputed", 1.0, 1, False),
    ],
)
def test_when_the_samplers_log_probabilities_are_taken(settings, top_p, epochs, taken):
    rollout = RolloutConfig(old_logprobs=settings, top_p=top_p)
    ppo = PPOConfig(rollout=rollout, epochs=epochs)
    sampler = tiny.sampler(tiny.causal_lm())
    assert takes_sampled_logprobs(ppo, sampler) is taken
    sampler.engine.exact = False
    assert takes_sampled_logprobs(ppo, sampler) is (settings == "sampled")
