"""How much work a stage is: its batches and its steps, from the recipe and the rows of its data.

`--dry-run`, `denserl plan`, the launcher and the stages themselves all count here, so that they say
the same and refuse the same.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from denserl_cli.core.data.splitting import held_out_rows
from denserl_cli.core.errors import DenserlError
from denserl_cli.core.recipe.fields import value_of
from denserl_cli.core.recipe.schema import Recipe
from denserl_cli.core.recipe.stages import FIT_FUNCTION, STAGES, TRAIN_PPO, TRAIN_RM


class Rows(NamedTuple):
    """Rows of a stage's data before they are read: those to train on, and those held out.

    Attributes:
        train: Rows that the stage works on.
        held_out: Rows kept for evaluation; pairs of one prompt stay together, so it may be fewer.
        source: Who says so: `recorded` or `of the sandbox`.
    """

    train: int
    held_out: int
    source: str

    @property
    def total(self) -> int:
        """All rows of the data."""
        return self.train + self.held_out

    def __str__(self) -> str:
        return f"{self.total:,} ({self.source})"


class Steps(NamedTuple):
    """The steps that a stage takes.

    Attributes:
        batches: Batches of rows: optimizer steps of train-rm, iterations of train-ppo, forward
            passes of each process in fit-function.
        per_batch: Steps that each of these makes.
    """

    batches: int
    per_batch: int = 1

    @property
    def total(self) -> int:
        """All steps."""
        return self.batches * self.per_batch


class Workload(NamedTuple):
    """The batches of a stage over its processes, and its steps.

    Attributes:
        unit: What a batch has so many of: pairs or responses.
        batch: Number of them in one step of all processes.
        micro_batch: Number of them in one forward pass of one process.
        processes: Processes that share a step.
        length: Tokens that one of them has at most.
        rows: Rows of the data; None where they are known when the data is read.
        steps: None where they depend on rows that are not known.
    """

    unit: str
    batch: int
    micro_batch: int
    processes: int
    length: int
    rows: Rows | None
    steps: Steps | None

    @property
    def accumulation(self) -> int:
        """Forward passes of one process in a step."""
        return self.batch // (self.micro_batch * self.processes)

    @property
    def tokens(self) -> int | None:
        """Tokens of all steps at most, padding counted."""
        return None if self.steps is None else self.steps.total * self.batch * self.length


def workload(stage: str, recipe: Recipe, processes: int = 1) -> Workload:
    """The work of a stage of training, as far as the recipe alone tells.

    Raises:
        DenserlError: The processes cannot share a batch, or the known rows do not make one.
    """
    check_batches(stage, recipe, processes)
    rows, steps = known_rows(stage, recipe), None
    if rows is not None:
        steps = count_steps(stage, recipe, rows.train, processes)
    elif (enough := _rows_that_do(stage, recipe)) is not None:
        steps = count_steps(stage, recipe, enough, processes)
    data, rm, ppo, fit = recipe.data, recipe.reward_model, recipe.ppo, recipe.normalizer
    unit, length = "pairs", 2 * data.max_length
    if stage == TRAIN_PPO:
        unit, length = "responses", ppo.max_prompt_length + ppo.rollout.max_new_tokens
    batch, micro = {
        TRAIN_RM: (rm.batch_size, rm.micro_batch_size),
        FIT_FUNCTION: (fit.batch_size * processes, fit.batch_size),
        TRAIN_PPO: (ppo.train_batch_size, ppo.micro_batch_size),
    }[stage]
    return Workload(unit, batch, micro, processes, length, rows, steps)


def count_steps(stage: str, recipe: Recipe, rows: int, processes: int = 1) -> Steps:
    """The steps that a number of rows makes.

    Args:
        stage: A stage of training.
        recipe: Its recipe.
        rows: Rows to train on, without those held out.
        processes: Processes that share the work; batches of weights in training do not depend on
            their number.

    Raises:
        DenserlError: The rows do not make one batch.
    """
    rm, ppo, fit = recipe.reward_model, recipe.ppo, recipe.normalizer
    if stage == FIT_FUNCTION:
        return Steps(math.ceil(min(fit.pairs, rows) / (fit.batch_size * processes)))
    if stage == TRAIN_RM:
        wanted = round(rm.epochs * rows)
        held = None if recipe.data.evaluation else "data.eval_pairs"
        fields = ("reward_model.batch_size", "reward_model.epochs", held)
        return Steps(_full_batches(recipe, rows, wanted, *fields))
    batch = ppo.rollout.batch_size
    wanted = round(ppo.passes * rows) if ppo.iterations is None else ppo.iterations * batch
    passes = "ppo.passes" if ppo.iterations is None else None
    return Steps(
        _full_batches(recipe, rows, wanted, "ppo.rollout.batch_size", passes, "data.eval_prompts"),
        per_batch=ppo.epochs * (batch * ppo.rollout.samples_per_prompt // ppo.train_batch_size),
    )


def known_rows(stage: str, recipe: Recipe) -> Rows | None:
    """The rows that the recipe records for its data, or that its sandbox makes; None: unknown."""
    data = recipe.data
    if stage == TRAIN_PPO:
        named, recorded, asked = data.prompts, "recorded.prompts", data.eval_prompts
    else:
        named, recorded, asked = data.preferences, "recorded.preference_pairs", data.eval_pairs
        if stage == FIT_FUNCTION and data.evaluation:
            return None  # it reads those as well, and their number is recorded nowhere
        if stage == FIT_FUNCTION or data.evaluation:
            asked = 0
    total, source = _made_rows(stage, recipe), "of the sandbox"
    if named:
        total, source = value_of(recipe, recorded), "recorded"
        if total is None:
            from denserl_cli.core.data.local_rows import count_local_rows

            total, source = count_local_rows(named), "rows, counted"
    if total is None:
        return None
    held = held_out_rows(total, asked)
    return Rows(total - held, held, source)


def check_batches(stage: str, recipe: Recipe, processes: int) -> None:
    """Raise DenserlError when so many processes cannot share a batch (`why_not_shared`)."""
    if error := why_not_shared(stage, recipe, processes):
        raise error


def why_not_shared(stage: str, recipe: Recipe, processes: int) -> DenserlError | None:
    """The error of a global batch that is not whole micro-batches in every process."""
    row = STAGES[stage]
    if not row.trains:
        return None
    field, micro_field = row.batch_size, row.micro_batches[0]
    batch, micro = value_of(recipe, field), value_of(recipe, micro_field)
    if batch % (micro * processes) == 0:
        return None
    return DenserlError(
        f"{field} {batch} is not a multiple of {micro_field} {micro} × {processes} processes",
        hint=f"{_what_divides(stage, recipe, processes)}; or change the number of processes",
    )


def _what_divides(stage: str, recipe: Recipe, processes: int) -> str:
    """Which micro-batch so many processes can work with; where there is none, which batches."""
    row = STAGES[stage]
    field, micro_field = row.batch_size, row.micro_batches[0]
    batch, micro = value_of(recipe, field), value_of(recipe, micro_field)

    def fitting(size: int) -> int:
        """The largest micro-batch that divides what each process has of a batch."""
        return max(n for n in range(1, micro + 1) if (size // processes) % n == 0)

    if batch % processes == 0:
        return f"set {micro_field}={fitting(batch)}"
    wanted = f"{field} must be a multiple of {processes}"
    sizes = [*range(processes, batch + processes, processes)]
    if stage == TRAIN_PPO:
        responses = recipe.ppo.rollout.batch_size * recipe.ppo.rollout.samples_per_prompt
        wanted += f" that divides the {responses} responses of an iteration"
        sizes = [n for n in range(processes, responses + 1, processes) if responses % n == 0]
    nearest = [*[n for n in sizes if n < batch][-1:], *[n for n in sizes if n > batch][:1]]
    if not nearest:
        return f"{wanted}, and none does: change ppo.rollout.batch_size"
    offers = (
        f"{size}" if fitting(size) == micro else f"{size} with {micro_field} {fitting(size)}"
        for size in nearest
    )
    return f"{wanted}: {' or '.join(offers)}"


def _rows_that_do(stage: str, recipe: Recipe) -> int | None:
    """Rows that make all the steps of a stage whose steps depend on no more than that."""
    if stage == FIT_FUNCTION:
        return recipe.normalizer.pairs
    sets_iterations = stage == TRAIN_PPO and recipe.ppo.iterations is not None
    return recipe.ppo.rollout.batch_size if sets_iterations else None


def _made_rows(stage: str, recipe: Recipe) -> int | None:
    """Rows that the recipe's sandbox makes, if it has one."""
    if recipe.sandbox is None:
        return None
    if stage != TRAIN_PPO:
        return recipe.sandbox.pairs
    from denserl_cli.core.sandbox.task import Task

    return len(Task(recipe.sandbox, recipe.seed).prompts)


def _full_batches(
    recipe: Recipe, rows: int, wanted: int, field: str, passes: str | None, held: str | None
) -> int:
    """Full batches in the wanted rows.

    Args:
        recipe: For the values of the fields.
        rows: Rows to train on, which are drawn from pass by pass.
        wanted: Rows of all passes.
        field: That of the batch size.
        passes: That of the passes over the rows; None where they do not count.
        held: That of the rows held out for evaluation; None where none are.

    Raises:
        DenserlError: One pass, or all of them together, does not make a batch.
    """
    batch = value_of(recipe, field)
    if min(rows, wanted) >= batch:
        return int(wanted // batch)
    reasons = [f"{passes} is {value_of(recipe, passes):g} for {rows} rows"] if passes else []
    if held and value_of(recipe, held):
        reasons.append(f"{held} {value_of(recipe, held)}, at most a tenth of all, are held out")
    remedies = [f"lower {field}"]
    if passes and rows >= batch:
        remedies.append(f"raise {passes}")
    raise DenserlError(
        f"not enough data for one batch: {min(rows, wanted)} rows, {field} is {batch}"
        + (f"; {'; '.join(reasons)}" if reasons else ""),
        hint=f"{', '.join(remedies)} or give more data",
    )
