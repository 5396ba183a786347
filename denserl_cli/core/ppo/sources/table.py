"""The sources that are built in: their function, where their rewards stand, what they promise."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Literal, NamedTuple

from torch import Tensor

from denserl_cli.core.ppo.sources.attention import attention
from denserl_cli.core.ppo.sources.differences import differences
from denserl_cli.core.ppo.sources.log_ratio import log_ratio
from denserl_cli.core.ppo.sources.record import Law
from denserl_cli.core.ppo.sources.shapley import shapley
from denserl_cli.core.ppo.sources.values import score, values

if TYPE_CHECKING:
    from denserl_cli.core.recipe.schema import RewardSource


class BuiltIn(NamedTuple):
    """A source that is built in.

    Attributes:
        function: Takes what its parameters name (`record.Inputs`), returns (B, T).
        stands: Whether its rewards are those of tokens, or stand at the ends of segments, over
            which they are spread.
        law: What each response's rewards add up to; None: nothing is promised.
    """

    function: Callable[..., Tensor]
    stands: Literal["tokens", "segments"]
    law: Law | None = None


_TABLE = {
    "values": BuiltIn(values, "segments"),
    "differences": BuiltIn(differences, "segments", "final value - prompt value"),
    "attention": BuiltIn(attention, "tokens", "score"),
    "score": BuiltIn(score, "tokens", "score"),
    "shapley": BuiltIn(shapley, "segments", "score - empty score"),
    "log_ratio": BuiltIn(log_ratio, "tokens"),
}


def built_in(one: RewardSource, *, bandit: bool = False) -> BuiltIn:
    """A built-in source with the settings that the recipe gives it.

    Args:
        one: Of `ppo.rewards`.
        bandit: Whether a response is one segment; differences are then those of its tokens.
    """
    found = _TABLE[one.source]
    if one.source == "log_ratio":
        assert one.scale is not None and one.clip is not None  # filled in by loading the recipe
        return found._replace(function=partial(log_ratio, scale=one.scale, clip=one.clip))
    if one.source == "differences" and bandit:
        return found._replace(stands="tokens")
    return found
