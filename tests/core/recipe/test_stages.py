"""The table of stages, and that nothing else knows what a stage is by its name."""

import ast
from pkgutil import resolve_name
from typing import get_args

import pytest

from denserl_cli.commands import slurm
from denserl_cli.core.recipe.building import known_keys
from denserl_cli.core.recipe.stages import CHANGEABLE, STAGES, TRAINING, Stage, later_stages
from tests import ROOT

CORE = ROOT / "denserl_cli" / "core"
ROWS = [pytest.param(row, id=name) for name, row in STAGES.items()]


@pytest.mark.parametrize("row", ROWS)
def test_a_row_names_fields_that_a_recipe_has(row: Stage):
    named = [*row.reads, *row.memory_fields, *([row.batch_size] if row.trains else [])]
    named += [f"data.{name}" for name in (row.data, *row.emptied)]
    assert [name for name in (*named, f"{row.block}.engine") if name not in known_keys()] == []


@pytest.mark.parametrize("row", ROWS)
def test_a_row_names_a_function(row: Stage):
    assert row.name == "segment" or callable(resolve_name(row.entry))


def test_the_stages_of_training_are_in_the_order_in_which_they_run():
    assert TRAINING == ("train-rm", "fit-function", "train-ppo")
    assert (
        later_stages("train-rm") == ("fit-function", "train-ppo")
        and later_stages("train-ppo") == ()
    )
    assert TRAINING == tuple(name for name, row in STAGES.items() if row.reads)
    assert (*TRAINING, "all") == get_args(slurm.Stage)


def test_what_may_change_is_read_by_some_stage_and_decides_about_memory():
    assert CHANGEABLE == (
        "model.gradient_checkpointing",
        "ppo.rollout.rows",
        "reward_model.micro_batch_size",
        "normalizer.batch_size",
        "ppo.micro_batch_size",
        "ppo.rollout.micro_batch_size",
    )


def test_no_other_file_of_core_spells_a_stages_name():
    names = {name for name in STAGES if "-" in name}
    spelled = [
        f"{path.relative_to(CORE)}:{node.lineno}"
        for path in sorted(CORE.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and node.value in names
    ]
    assert {place.partition(":")[0] for place in spelled} == {"recipe/stages.py"}, spelled
