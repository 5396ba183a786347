"""How much work a recipe's stages are: batches, optimizer steps, tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from denserl_cli.core.errors import DenserlError
from denserl_cli.core.recipe.schema import Recipe, Source


class Workload(NamedTuple):
    """A stage's batches and steps. Figures that only the data know are None.

    rounds: forward passes of one process to a step; tokens: at most, padding counted, in all.
    """

    what: str
    batch: int
    micro_batch: int
    ranks: int
    rounds: int
    steps: int | None
    tokens: int | None

    @property
    def idle(self) -> int:
        """Micro-batches of a step that a process works on in vain, so that all make as many."""
        return self.rounds * self.ranks - math.ceil(self.batch / self.micro_batch)


def workload(recipe: Recipe, stage: str, ranks: int) -> Workload:
    """The work of a stage over so many processes."""
    if stage == "train-rm":
        rm, rows = recipe.reward_model, preference_pairs(recipe)
        held = (
            0 if recipe.data.evaluation or rows is None else min(recipe.data.eval_pairs, rows // 10)
        )
        steps = None if rows is None else round(rm.epochs * (rows - held)) // rm.batch_size
        return _made("pairs", rm.batch_size, rm.micro_batch_size, ranks, steps, _pair(recipe))
    if stage == "fit-function":
        size, rows = recipe.normalizer.batch_size, preference_pairs(recipe)
        pairs = recipe.normalizer.pairs if rows is None else min(recipe.normalizer.pairs, rows)
        batch = size * ranks
        return _made("pairs", batch, size, ranks, math.ceil(pairs / batch), _pair(recipe))
    ppo = recipe.ppo
    responses, found = ppo.rollout_batch_size * ppo.samples_per_prompt, iterations(recipe)
    steps = None if found is None else found * ppo.epochs * (responses // ppo.train_batch_size)
    length = ppo.max_prompt_length + ppo.max_new_tokens
    return _made("responses", ppo.train_batch_size, ppo.micro_batch_size, ranks, steps, length)


def iterations(recipe: Recipe) -> int | None:
    """Rounds of rollout and update; None where the number of prompts is not known."""
    ppo, recorded = recipe.ppo, recipe.recorded
    if ppo.iterations is not None:
        return ppo.iterations
    if recipe.data.prompts and recorded is not None and recorded.prompts is not None:
        held = min(recipe.data.eval_prompts, recorded.prompts // 10)
        return round(ppo.passes * (recorded.prompts - held)) // ppo.rollout_batch_size
    return None


def preference_pairs(recipe: Recipe) -> int | None:
    """Pairs that the recipe records for its hub data, or that its sandbox makes."""
    if recipe.data.preferences:
        return recipe.recorded.preference_pairs if recipe.recorded else None
    return recipe.sandbox.pairs if recipe.sandbox else None


def _pair(recipe: Recipe) -> int:
    return 2 * recipe.data.max_length


def _made(what: str, batch: int, micro: int, ranks: int, steps: int | None, row: int) -> Workload:
    rounds = math.ceil(math.ceil(batch / micro) / ranks)
    tokens = None if steps is None else steps * batch * row
    return Workload(what, batch, micro, ranks, rounds, steps, tokens)


class Size(NamedTuple):
    """Rows of a data set and how the plan knows them."""

    rows: int
    source: str

    def __str__(self) -> str:
        return f"{self.rows:,} ({self.source})"


def check_batches(stage: str, recipe: Recipe, ranks: int) -> None:
    """Raise DenserlError when a global batch is not whole micro-batches on every rank."""
    if stage == "fit-function":
        return
    block, key = (
        ("reward_model", "batch_size") if stage == "train-rm" else ("ppo", "train_batch_size")
    )
    settings = getattr(recipe, block)
    total, micro = getattr(settings, key), settings.micro_batch_size
    if total % (micro * ranks):
        raise DenserlError(
            f"{block}.{key} {total} is not a multiple of {block}.micro_batch_size {micro} × "
            f"{ranks} processes",
            hint=f"change one of the two, or --processes; {block}.micro_batch_size divides "
            f"{total // ranks if total % ranks == 0 else total} here",
        )


def _pairs(recipe: Recipe) -> Size | None:
    if recipe.data.preferences:
        recorded = recipe.recorded.preference_pairs if recipe.recorded else None
        return _recorded(recorded) or _counted(recipe.data.preferences)
    return Size(recipe.sandbox.pairs, "of the sandbox") if recipe.sandbox else None


def _prompts(recipe: Recipe) -> Size | None:
    if recipe.data.prompts:
        recorded = recipe.recorded.prompts if recipe.recorded else None
        return _recorded(recorded) or _counted(recipe.data.prompts)
    if recipe.sandbox is None:
        return None
    from denserl_cli.core.sandbox.task import Task

    return Size(len(Task(recipe.sandbox, recipe.seed).prompts), "of the sandbox")


def _recorded(rows: int | None) -> Size | None:
    return None if rows is None else Size(rows, "recorded")


def _counted(sources: Sequence[Source]) -> Size | None:
    """The rows of local files."""
    from denserl_cli.core.data.local_rows import count_local_rows

    rows = count_local_rows(sources)
    return None if rows is None else Size(rows, "rows, counted")


def _held_out(size: Size, asked: int) -> int:
    """At most a tenth; rows with one prompt stay together, so it may be a few less."""
    return min(asked, size.rows // 10)


def _steps(rows: int, batch: int, passes: float, field: str) -> int:
    from denserl_cli.core.data.batches import step_count

    return step_count(rows, batch, epochs=passes, field=field)
