"""A process of `test_modes.py`: one update of a tiny policy and critic in every mode."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from denserl_cli.core.engine.torch_engine import TorchEngine
from denserl_cli.core.ppo.estimators import estimate_advantages
from denserl_cli.core.ppo.rollout import Rollout
from denserl_cli.core.ppo.update import Updater
from denserl_cli.core.recipe.schema import PPOConfig, RolloutConfig
from denserl_cli.core.system import distributed
from tests import tiny
from tests.core.engine.deepspeed_worker import make_engine
from tests.core.ppo.conftest import made_up_rollout

BASE = PPOConfig(
    train_batch_size=6,
    micro_batch_size=1,
    value_clip=0.25,
    rollout=RolloutConfig(samples_per_prompt=2, max_new_tokens=8),
)
MODES: dict[str, PPOConfig] = {
    "gae": BASE,
    "macro": replace(BASE, action="segment", lam="adaptive", lam_value=1.0, lam_alpha=0.5),
    "group": replace(BASE, advantage="group", loss_reduce="constant"),
    "rloo": replace(BASE, advantage="rloo", baseline="token", loss_reduce="token"),
    "reinforce++": replace(BASE, advantage="reinforce++", kl_loss="k2"),
    "losses": replace(
        BASE, kl_loss="k3", entropy_coef=0.1, policy_clip_high=0.3, dual_clip=3.0, value_clip="none"
    ),
}


def update(settings: PPOConfig, kind: str, rollout: Rollout) -> dict[str, Any]:
    """The metrics of one update, and the policy's weights after it."""

    def engine(model: torch.nn.Module) -> TorchEngine:
        return make_engine(model, kind, stage=2)

    actor = engine(tiny.causal_lm(0))
    critic = engine(tiny.scalar_model(1)) if settings.has_critic else None
    updater = Updater(settings, actor=actor, critic=critic, pad_id=0, seed=3)
    found = estimate_advantages(settings, rollout.token_values, rollout)
    metrics = updater.update(1, rollout, *found, kl_coef=0.1)
    with actor.gathered() as model:
        weights = {name: value.clone() for name, value in model.state_dict().items()}
    return {"metrics": metrics, "weights": weights}


def main(out: str) -> None:
    """Every mode in one process group; the first process writes what it found."""
    distributed.join()
    found = {name: update(one, "deepspeed", made_up_rollout()) for name, one in MODES.items()}
    if distributed.is_main_process():
        torch.save(found, Path(out))
    distributed.leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
