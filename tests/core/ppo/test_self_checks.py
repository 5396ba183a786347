"""What must hold before the first update."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PhimoeConfig, PhimoeForCausalLM

from denserl_cli.core.errors import DenserlError
from denserl_cli.core.models import architecture
from denserl_cli.core.observer import Observer
from denserl_cli.core.ppo.rollout import Rollout
from denserl_cli.core.ppo.self_checks import refuse_other_ratio, refuse_other_samples
from denserl_cli.core.sampling.sampler import Sampler
from denserl_cli.core.stages.run import run_stage
from tests import tiny


def drawn(tokens: int, temperature: float = 1.0, seed: int = 0) -> Rollout:
    """Tokens drawn at a temperature, measured at 1: log-probabilities and entropies."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(tokens, 50, generator=generator)
    token = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
    plain = logits.log_softmax(-1)
    numbers = plain.gather(1, token).T, -(plain.exp() * plain).sum(-1)[None]
    fields: dict[str, Any] = dict.fromkeys(Rollout._fields)
    fields |= {"logprobs": numbers[0], "policy_entropy": numbers[1]}
    return Rollout(**{**fields, "response_mask": torch.ones(1, tokens, dtype=torch.bool)})


def test_without_an_entropy_nothing_is_refused():
    refuse_other_samples(drawn(4000, temperature=3.0)._replace(policy_entropy=None))


@pytest.mark.parametrize("tokens", [40, 400, 4000])
def test_samples_of_the_measured_distribution_pass(tokens: int):
    for seed in range(20):
        refuse_other_samples(drawn(tokens, seed=seed))
        refuse_other_samples(drawn(tokens, temperature=0.8, seed=seed))  # likelier, as with top-p


def test_samples_of_another_distribution_are_refused():
    with pytest.raises(DenserlError, match="not those of the policy"):
        refuse_other_samples(drawn(400, temperature=2.0))


def test_a_ratio_within_rounding_passes():
    refuse_other_ratio(9e-5, 1e-4)
    with pytest.raises(DenserlError, match="not 1 before the first update"):
        refuse_other_ratio(2e-4, 1e-4)


def train(run: Path) -> None:
    run_stage("train-ppo", tiny.recipe("ppo.iterations=1"), run, "start", Observer())


def test_noise_that_is_left_in_a_policy_is_refused_before_its_first_update(
    scored: Path, monkeypatch
):
    real = architecture.switch_off_noise

    def noisy(config: Any) -> None:
        real(config)
        config.attention_dropout = 0.3

    monkeypatch.setattr(architecture, "switch_off_noise", noisy)
    with pytest.raises(DenserlError, match="not 1 before the first update"):
        train(scored)


def test_a_sampler_that_draws_something_else_is_refused(scored: Path, monkeypatch):
    real = Sampler.sample

    def hot(self: Sampler, prompts: Any, keys: Any, sampling: Any, **more: Any) -> Any:
        return real(self, prompts, keys, sampling._replace(temperature=4.0), **more)

    monkeypatch.setattr(Sampler, "sample", hot)
    with pytest.raises(DenserlError, match="not those of the policy"):
        train(scored)


def test_jitter_of_a_router_changes_ratios_unless_it_is_off():
    """Why `switch_off_noise` is there: this is what PhiMoE's own settings do."""
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = PhimoeConfig(
        **shape, vocab_size=32, num_attention_heads=4, num_key_value_heads=2, num_local_experts=4,
        router_jitter_noise=0.3, input_jitter_noise=0.3, initializer_range=0.3,
    )  # fmt: skip
    ids = torch.arange(1, 31)[None]
    for off in (False, True):
        torch.manual_seed(0)
        if off:
            architecture.switch_off_noise(config)
        model = PhimoeForCausalLM(config)
        with torch.no_grad():
            trained, measured = (
                model.train(mode)(input_ids=ids, use_cache=False).logits.log_softmax(-1)
                for mode in (True, False)
            )
        assert bool((trained - measured).abs().max() < 1e-4) is off
