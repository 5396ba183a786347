"""One count of batches and steps: what a plan says is what a stage does and refuses."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from denserl_cli.core.data.batches import global_batches
from denserl_cli.core.errors import DenserlError
from denserl_cli.core.planning.dry_run import plan_lines
from denserl_cli.core.planning.workload import (
    Steps,
    check_batches,
    count_steps,
    known_rows,
    why_not_shared,
    workload,
)
from denserl_cli.core.recipe import Recipe, load_recipe
from denserl_cli.core.recipe.catalog import list_recipes
from denserl_cli.core.recipe.stages import FIT_FUNCTION, STAGES, TRAIN_PPO, TRAIN_RM, TRAINING
from tests import tiny

BIG = (
    "model: {path: org/llama}\nsegmentation: {cutoff: 2}\n"
    "data: {preferences: org/pairs, prompts: org/prompts}\n"
    "reward_model: {batch_size: 128, micro_batch_size: 4}\n"
    "ppo: {train_batch_size: 128, micro_batch_size: 2}\n"
    "recorded: {preference_pairs: 700000, prompts: 60917}\n"
)


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """A recipe on hub data of a known size."""
    file = tmp_path / "big.yaml"
    file.write_text(BIG)
    return load_recipe(str(file))


def test_batches_steps_and_tokens(recipe: Recipe):
    work = workload(TRAIN_RM, recipe, 8)
    assert (work.unit, work.batch, work.micro_batch, work.accumulation) == ("pairs", 128, 4, 4)
    assert work.steps == Steps((700_000 - 2000) // 128)
    assert work.tokens == (700_000 - 2000) // 128 * 128 * 2 * 2048
    ppo = workload(TRAIN_PPO, recipe, 8)
    assert ppo.steps == Steps((60_917 - 64) // 1024, per_batch=1024 // 128)
    assert ppo.tokens == ppo.steps.total * 128 * ppo.length
    unknown = workload(TRAIN_PPO, replace(recipe, recorded=None), 8)
    assert unknown.rows is None and unknown.steps is None and unknown.tokens is None


def test_processes_share_the_passes_of_fit_function(recipe: Recipe):
    for processes, passes in ((1, 7500), (8, 938)):
        work = workload(FIT_FUNCTION, recipe, processes)
        assert (work.batch, work.steps) == (8 * processes, Steps(passes))
        line = next(x for x in plan_lines(FIT_FUNCTION, recipe, processes) if "passes:" in x)
        assert f"about {passes:,}" in line and ("each process" in line) == (processes > 1)


def test_what_is_held_out_of_data_of_a_known_size(recipe: Recipe):
    def known(stage: str, *settings: str) -> tuple[int, int]:
        rows = known_rows(stage, tiny.recipe(*settings))
        return rows.train, rows.held_out

    assert known(TRAIN_RM) == (76, 4) and known(FIT_FUNCTION) == (80, 0)
    assert known(TRAIN_RM, "data.eval_pairs=2000") == (72, 8)
    assert known(TRAIN_RM, "data.evaluation=org/other") == (80, 0)
    assert known(TRAIN_PPO, "data.eval_prompts=1000") == (58, 6)
    with_others = replace(recipe, data=replace(recipe.data, evaluation=recipe.data.preferences))
    assert known_rows(FIT_FUNCTION, with_others) is None  # it reads both; one is not recorded


def test_iterations_of_the_sandbox_follow_from_its_prompts():
    """The dry run counted them; the workload of `denserl plan` said that nobody knows."""
    recipe = tiny.recipe("ppo.iterations=null", "ppo.rollout.batch_size=48")
    assert workload(TRAIN_PPO, recipe).steps == Steps(1, per_batch=48)
    assert "iterations: 1 = 62 prompts × 1 passes / 48, if every row is usable" in plan_lines(
        TRAIN_PPO, recipe
    )


def test_iterations_that_are_set_need_no_rows_but_enough_of_them(recipe: Recipe):
    asked = replace(recipe, recorded=None, ppo=replace(recipe.ppo, iterations=7))
    assert workload(TRAIN_PPO, asked).steps == Steps(7, per_batch=8)
    with pytest.raises(DenserlError, match=r"1023 rows, ppo\.rollout\.batch_size is 1024"):
        count_steps(TRAIN_PPO, asked, 1023)
    assert count_steps(TRAIN_PPO, asked, 1024).batches == 7


@pytest.mark.parametrize(("rows", "epochs"), [(3, 1.0), (3, 5.0), (100, 0.03), (0, 1.0)])
def test_too_few_rows_for_one_batch_are_refused(rows: int, epochs: float):
    recipe = tiny.recipe("reward_model.batch_size=4", "reward_model.micro_batch_size=4")
    recipe = replace(recipe, reward_model=replace(recipe.reward_model, epochs=epochs))
    with pytest.raises(DenserlError, match=r"not enough.*: \d rows, reward_model\.batch_size is 4"):
        count_steps(TRAIN_RM, recipe, rows)


@pytest.mark.parametrize(("rows", "epochs"), [(6, 1.0), (5, 3.0), (50, 2.0), (10, 0.3), (7, 1.5)])
def test_the_steps_are_what_the_rows_of_all_epochs_fill(rows: int, epochs: float):
    recipe = tiny.recipe("reward_model.batch_size=2", "reward_model.micro_batch_size=2")
    recipe = replace(recipe, reward_model=replace(recipe.reward_model, epochs=epochs))
    steps = count_steps(TRAIN_RM, recipe, rows).total
    assert steps == round(epochs * rows) // 2
    assert len(global_batches(rows, 2, steps=steps, seed=1)) == steps


@pytest.mark.parametrize("name", list_recipes())
@pytest.mark.parametrize("stage", TRAINING)
def test_shipped_recipes_run_as_published(name: str, stage: str):
    recipe = load_recipe(name)
    gpus = (recipe.recorded and recipe.recorded.gpus) or 1
    work = workload(stage, recipe, gpus)
    assert work.batch == work.micro_batch * work.accumulation * gpus


@pytest.mark.parametrize("batch", [1, 2, 7, 8, 16, 30, 128])
@pytest.mark.parametrize("micro", [1, 2, 8])
@pytest.mark.parametrize("processes", [2, 3, 5, 8, 12])
@pytest.mark.parametrize("stage", [TRAIN_RM, TRAIN_PPO])
def test_what_a_refusal_proposes_is_accepted(stage: str, batch: int, micro: int, processes: int):
    row = STAGES[stage]
    field, micro_field = row.batch_size, row.micro_batches[0]
    if batch % micro:
        return  # the recipe itself is refused
    settings = [f"{field}={batch}", f"{micro_field}={micro}"]
    if stage == TRAIN_PPO:
        settings += [f"ppo.rollout.batch_size={batch * 3}", "ppo.rollout.samples_per_prompt=2"]
    refused = why_not_shared(stage, tiny.recipe(*settings), processes)
    if refused is None:
        return
    assert str(refused).startswith(f"{field} {batch} is not a multiple of {micro_field} {micro} ×")
    assert refused.hint is not None
    if refused.hint.startswith("set "):
        proposals = [[refused.hint.split()[1].rstrip(";")]]
    elif "none does" in refused.hint:
        responses = batch * 6
        assert not [n for n in range(1, responses + 1) if responses % n == n % processes == 0]
        return
    else:
        sizes = refused.hint.partition(": ")[2].partition(";")[0].split(" or ")
        proposals = [re.sub(r"^(\d+)", rf"{field}=\1", size).split(" with ") for size in sizes]
        proposals = [[size, *(w.replace(" ", "=") for w in rest)] for size, *rest in proposals]
    assert proposals
    for proposal in proposals:
        check_batches(stage, tiny.recipe(*settings, *proposal), processes)


def test_a_batch_that_no_micro_batch_can_share_names_the_batches_that_can():
    """It used to propose a micro-batch of 8 for three processes."""
    recipe = tiny.recipe("reward_model.batch_size=8", "reward_model.micro_batch_size=4")
    with pytest.raises(DenserlError) as error:
        check_batches(TRAIN_RM, recipe, 3)
    assert error.value.hint == (
        "reward_model.batch_size must be a multiple of 3: 6 with reward_model.micro_batch_size 2 "
        "or 9 with reward_model.micro_batch_size 3; or change the number of processes"
    )


def test_a_plan_is_what_the_stages_do(scored: Path):
    """Steps of a finished run, counted in its own lines."""
    lines = [json.loads(line) for line in (scored / "metrics.jsonl").read_text().splitlines()]
    steps = workload(TRAIN_RM, tiny.recipe()).steps
    assert steps is not None
    assert steps.total == max(line["step"] for line in lines if line["stage"] == TRAIN_RM)
