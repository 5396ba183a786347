"""A process of `test_sharding.py`: loads a saved model in shards, and resumes from shards."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from denserl_cli.core.data.batches import collate_sequences
from denserl_cli.core.engine.base import step
from denserl_cli.core.engine.factory import check_engine, freeze, make_engine, placement
from denserl_cli.core.errors import DenserlError
from denserl_cli.core.models.causal_lm import response_logprobs
from denserl_cli.core.models.lora import load_reference, new_policy, new_scalar_model
from denserl_cli.core.models.scalar_head import token_values
from denserl_cli.core.recipe import Recipe, load_recipe
from denserl_cli.core.recipe.schema import LoraConfig
from denserl_cli.core.system import distributed

BATCH = collate_sequences([np.array([3, 5, 7])] * 4, [np.array([4, 6, 2])] * 4, 0)
STEPS = 4


def recipe_of(folder: Path, dtype: str, stage: int = 3) -> Recipe:
    """A recipe whose model is in a folder, under ZeRO in every stage."""
    small = "{zero_optimization: {stage3_param_persistence_threshold: 0}}"  # or nothing is spread
    engine = f"{{kind: deepspeed, zero_stage: {stage}, deepspeed: {small}}}"
    settings = [f"model.path={folder}", f"model.dtype={dtype}", "sandbox=null"]
    return load_recipe("sandbox-segment", [*settings, f"ppo.engine={engine}"])


def shares_and_results_are_right(folder: Path, dtype: str) -> None:
    """Each process holds its share of every weight, and computes what whole models compute."""
    recipe = recipe_of(folder, dtype)
    engine = recipe.ppo.engine
    places = {flag: placement(recipe, engine, trained=flag) for flag in (False, True)}
    reference = load_reference(recipe, places[False])
    for name, weight in reference.named_parameters():
        assert weight.numel() == 0, name
        share = weight.ds_tensor  # type: ignore[attr-defined]
        assert share.numel() == -(-weight.ds_numel // distributed.world_size()), name  # type: ignore[attr-defined]
        assert share.dtype == getattr(torch, dtype)
    torch.manual_seed(0)
    scalar = new_scalar_model(recipe, None, places[True])
    assert scalar.score.weight.dtype == torch.float32
    torch.manual_seed(0)
    whole = new_scalar_model(recipe, None)
    with torch.no_grad():
        found = freeze(reference, recipe, engine)(response_logprobs, BATCH).logprobs
        expected = freeze(load_reference(recipe), recipe)(response_logprobs, BATCH).logprobs
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        trained = make_engine(recipe, engine, scalar, learning_rate=0.1, total_steps=STEPS)
        if dtype == "float32":
            values = trained(token_values, BATCH)
            torch.testing.assert_close(values, token_values(whole, BATCH), rtol=0, atol=1e-5)
    weights = trained.weights()
    if weights is not None:  # float32 masters of what was read
        read = {name: value.to(getattr(torch, dtype)) for name, value in whole.state_dict().items()}
        read["score.weight"] = whole.score.weight.detach()
        assert weights.keys() == read.keys()
        for name, value in weights.items():
            assert torch.equal(value, read[name].float()), name


def adapters_learn_over_a_spread_body(folder: Path) -> None:
    """LoRA under ZeRO 3, where all models share one spread body, is LoRA under ZeRO 2."""
    found = []
    for stage in (2, 3):
        recipe = replace(recipe_of(folder, "float32", stage), lora=LoraConfig(rank=4))
        engine = recipe.ppo.engine
        check_engine(recipe, engine, "ppo.engine")
        reference = load_reference(recipe, placement(recipe, engine, trained=False))
        torch.manual_seed(0)
        models = new_policy(recipe, reference), new_scalar_model(recipe, reference)
        frozen = freeze(reference, recipe, engine)
        actor, critic = (
            make_engine(recipe, engine, model, learning_rate=0.01, total_steps=STEPS)
            for model in models
        )
        figures = []
        for _ in range(2):
            with torch.no_grad():
                figures.append(frozen(response_logprobs, BATCH).logprobs.sum().item())
            loss = -actor(response_logprobs, BATCH).logprobs.mean()
            values = (critic(token_values, BATCH) - 1).square().mean()
            with actor.gathered() as policy, torch.no_grad():
                ids = policy.generate(torch.tensor([[3, 5]]), max_new_tokens=4, do_sample=False)
            for one, part in ((actor, loss), (critic, values)):
                one.backward(part / distributed.world_size())
            step(actor, critic)
            figures += [loss.item(), values.item(), *map(float, ids[0])]
        weights = actor.weights() or {}
        figures += [v.sum().item() for name, v in sorted(weights.items()) if "lora" in name]
        found.append(figures)
    assert found[1] == pytest.approx(found[0], rel=1e-4, abs=1e-4)
    assert distributed.rank() or len(found[0]) > 20


def damage_is_found_by_all(folder: Path) -> None:
    """A NaN in one process's share is refused by every process."""
    recipe = recipe_of(folder, "bfloat16")
    with pytest.raises(DenserlError, match=r"NaN or infinite: model\.norm\.weight"):
        new_policy(recipe, None, placement(recipe, recipe.ppo.engine, trained=True))  # type: ignore[arg-type]


def train(engine: Any, steps: int) -> list[float]:
    """Some steps; the losses."""
    losses = []
    for _ in range(steps):
        loss = (engine(token_values, BATCH) - 1).square().mean()
        engine.backward(loss / distributed.world_size())
        step(engine)
        losses.append(loss.item())
    return losses


def critic(folder: Path, stage: int, dtype: str) -> Any:
    """A new critic's engine."""
    recipe = recipe_of(folder, dtype, stage)
    torch.manual_seed(0)
    model = new_scalar_model(recipe, None, placement(recipe, recipe.ppo.engine, trained=True))
    return make_engine(recipe, recipe.ppo.engine, model, learning_rate=0.01, total_steps=STEPS)


def saves(models: Path, out: Path) -> None:
    """Train, save half way for every ZeRO stage; the losses after that are the expected ones."""
    losses = {}
    for stage, dtype in ((1, "bfloat16"), (2, "float32"), (3, "bfloat16")):
        engine = critic(models / "good", stage, dtype)
        train(engine, STEPS // 2)
        engine.save_shards(out / f"step-{stage}" / "critic")
        losses[stage] = engine.state(), train(engine, STEPS // 2)
    if distributed.is_main_process():
        torch.save(losses, out / "losses")


def resumes(models: Path, out: Path) -> None:
    """Go on in this number of processes."""
    losses = torch.load(out / "losses")
    for stage, dtype in ((1, "bfloat16"), (2, "float32"), (3, "bfloat16")):
        state, expected = losses[stage]
        engine = critic(models / "good", stage, dtype)
        train(engine, 1)  # what is read replaces everything
        engine.restore(state)
        engine.load_shards(out / f"step-{stage}" / "critic")
        exact = 1e-5 if dtype == "float32" else 1e-2  # bfloat16 rounds sums over processes
        assert train(engine, STEPS // 2) == pytest.approx(expected, rel=exact)
        assert not list(out.glob("*universal*"))


def main(work: str, models: str, out: str) -> None:
    """Do one of the works above."""
    distributed.join()
    if work == "load":
        for dtype in ("float32", "bfloat16"):
            shares_and_results_are_right(Path(models, "good"), dtype)
            shares_and_results_are_right(Path(models, "tied"), dtype)
        damage_is_found_by_all(Path(models, "damaged"))
        adapters_learn_over_a_spread_body(Path(models, "good"))
    elif work == "save":
        saves(Path(models), Path(out))
    else:
        resumes(Path(models), Path(out))
    distributed.leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
