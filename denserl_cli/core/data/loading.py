"""What every stage begins with: the sandbox's files, the tokenizer's format, the encoded data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from denserl_cli.core.chat.format import ChatFormat
from denserl_cli.core.data.arrow_rows import PairRows, PromptRows, StepRows
from denserl_cli.core.data.encoding import PairEncoding, PromptEncoding, StepEncoding
from denserl_cli.core.data.kinds import all_steps
from denserl_cli.core.data.mixture import Mixture, mixed
from denserl_cli.core.data.skipped import Skipped, count_skipped
from denserl_cli.core.data.sources import row_count
from denserl_cli.core.data.splitting import split_pairs, split_prompts
from denserl_cli.core.recipe.schema import Recipe, Source
from denserl_cli.core.system.distributed import broadcast_object, from_local_main_process

if TYPE_CHECKING:
    from denserl_cli.core.observer import Observer

SPLIT_SEED = 42
"""What is held out for evaluation does not depend on a recipe's seed (method §6)."""


class PairData(NamedTuple):
    """Encoded preferences for training and for evaluation, and the skipped rows.

    They are pairs, or responses in labelled steps.
    """

    train: PairRows | StepRows
    evaluation: PairRows | StepRows
    skipped: list[Skipped]

    @property
    def everything(self) -> PairRows | StepRows:
        """The rows for training, then those for evaluation."""
        return self.train.followed_by(self.evaluation)  # type: ignore[arg-type]


class PromptData(NamedTuple):
    """Encoded prompts for training and for evaluation, and the skipped rows."""

    train: PromptRows
    evaluation: PromptRows
    skipped: list[Skipped]

    @property
    def everything(self) -> PromptRows:
        """The prompts for training, then those for evaluation."""
        return self.train.followed_by(self.evaluation)


def load_pairs(recipe: Recipe, chat: ChatFormat, observer: Observer) -> PairData:
    """Read, encode and split the recipe's pairs or steps; count the rows that are skipped.

    Without evaluation sources, a part of the rows is held out. Raises DenserlError as well where
    some sources have pairs and some have steps.
    """
    data = recipe.data
    _hold_steps((*data.preferences, *data.evaluation))
    rows, skipped, _ = encode_sources(recipe, data.preferences, chat, observer)
    if data.evaluation:
        held, more, _ = encode_sources(recipe, data.evaluation, chat, observer)
        skipped = [*skipped, *more]
    else:
        rows, held = split_pairs(rows, data.eval_pairs, SPLIT_SEED)
    count_skipped(skipped, observer)
    return PairData(rows, held, skipped)


def draw_pairs(
    recipe: Recipe, chat: ChatFormat, count: int, seed: int, observer: Observer
) -> tuple[PairRows | StepRows, list[Skipped]]:
    """At most `count` of all of a recipe's preference pairs or steps, drawn with a seed.

    Where the sources have more rows, as many as are wanted are drawn, alike from each, before any
    is tokenised; those that cannot be used are not made up for. Returns the rows, and the
    skipped ones.
    """
    data = recipe.data
    sources = (*data.preferences, *data.evaluation)
    sizes = broadcast_object(from_local_main_process(lambda: [row_count(one) for one in sources]))
    total = sum(size * source.weight for size, source in zip(sizes, sources, strict=True))
    if all(sizes) and total > count:
        thinned = tuple(
            replace(source, max_samples=math.ceil(size * count / total))
            for size, source in zip(sizes, sources, strict=True)
        )
        split = len(data.preferences)
        data = replace(data, preferences=thinned[:split], evaluation=thinned[split:])
        recipe = replace(recipe, seed=seed, data=data)
    found = load_pairs(recipe, chat, observer)
    everything = found.everything
    order = np.random.default_rng(seed).permutation(len(everything))[:count]
    return everything.take(order), found.skipped


def at_most(limit: int | None, sources: Sequence[Source]) -> tuple[Source, ...]:
    """The same sources, of each of which at most `limit` rows are drawn."""
    if limit is None:
        return tuple(sources)
    return tuple(
        replace(source, max_samples=min(limit, source.max_samples or limit)) for source in sources
    )


def encode_sources(
    recipe: Recipe, sources: Sequence[Source], chat: ChatFormat, observer: Observer
) -> Mixture:
    """Read and encode the pairs or steps of sources; `skipped` holds all unusable rows."""
    data = recipe.data
    steps = _hold_steps(sources)
    encoding = (StepEncoding if steps else PairEncoding)(
        chat, data.max_length, data.max_prompt_length
    )
    found = mixed(encoding, sources, seed=recipe.seed, strict=data.strict, observer=observer)
    if found.truncated:
        limit, lost = data.max_length, ""
        what = "responses in steps" if steps else "pairs"
        if steps:
            lost = "; labels of steps that are not whole any more are left out"
        observer.notice(f"{found.truncated} {what} were cut to data.max_length {limit}{lost}")
    return found


def _hold_steps(sources: Sequence[Source]) -> bool:
    """Whether sources hold labelled steps. Raises DenserlError for a mixture of both."""
    return bool(broadcast_object(from_local_main_process(lambda: all_steps(sources))))


def load_prompts(recipe: Recipe, chat: ChatFormat, observer: Observer) -> PromptData:
    """Read, encode and split the recipe's prompts; count the rows that are skipped."""
    data = recipe.data
    limit = recipe.ppo.max_prompt_length
    encoding = PromptEncoding(chat, limit)
    found = mixed(encoding, data.prompts, seed=recipe.seed, strict=data.strict, observer=observer)
    if found.truncated:
        observer.notice(
            f"{found.truncated} prompts were cut on the left to ppo.max_prompt_length {limit}"
        )
    count_skipped(found.skipped, observer)
    train, held = split_prompts(found.rows, data.eval_prompts, SPLIT_SEED)
    return PromptData(train, held, found.skipped)
