"""What a recipe makes of its data: the objective of train-rm, and whether the data fit it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from denserl_cli.core.errors import DenserlError
from denserl_cli.core.reward_model.loss import PreferenceObjective

if TYPE_CHECKING:
    from denserl_cli.core.data.arrow_rows import PairRows
    from denserl_cli.core.recipe.schema import RewardModelConfig


def objective_of(settings: RewardModelConfig, data: Sequence[PairRows]) -> PreferenceObjective:
    """The objective of a recipe.

    Args:
        settings: The recipe's `reward_model`.
        data: All pairs whose loss is taken.

    Raises:
        DenserlError: Margins are to be weights, and there are none, or negative ones; or rankings
            of three or more answers have margins.
    """
    if settings.margins != "ignore":
        _check_rankings(settings.margins, data)
    if settings.margins == "weight":
        found = np.concatenate([rows.numbers("margin").astype(float) for rows in data])
        if np.isnan(found).all():
            raise DenserlError(
                "reward_model.margins is weight, and no pair has a margin",
                hint="name its column in columns.margin, or set reward_model.margins=ignore",
            )
        if (found < 0).any():
            raise DenserlError(
                f"reward_model.margins is weight, and {int((found < 0).sum())} pairs have a "
                "negative margin: they would be learned the other way round",
                hint="correct the column of the margin, or set reward_model.margins=target",
            )
    return PreferenceObjective(
        **{name: getattr(settings, name) for name in PreferenceObjective._fields}
    )


def _check_rankings(margins: str, data: Sequence[PairRows]) -> None:
    """Raise DenserlError for a ranking of three or more answers with a margin."""
    for rows in filter(len, data):
        found = np.flatnonzero(
            (rows.numbers("others") > 0) & ~np.isnan(rows.numbers("margin").astype(float))
        )
        if len(found):
            raise DenserlError(
                f"reward_model.margins is {margins}, which has no meaning for a ranking: "
                f"{len(found)} rankings have a margin (the first: {rows[int(found[0])].origin})",
                hint="set reward_model.margins=ignore, or `pairs` of the source to all",
            )


def check_unset(settings: RewardModelConfig) -> None:
    """Raise DenserlError for settings of preference pairs, which labelled steps do not have."""
    usual = type(settings)()
    names = [n for n in PreferenceObjective._fields if getattr(settings, n) != getattr(usual, n)]
    if names:
        fields = ", ".join(f"reward_model.{name}" for name in names)
        raise DenserlError(
            f"{fields}: for preference pairs, and the data have steps with labels",
            hint="; ".join(f"set reward_model.{n}={getattr(usual, n)}" for n in names),
        )
