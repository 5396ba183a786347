"""A recipe with nothing left open: what stages, scorers and trainers work with.

`Recipe` is what people write. Loading fills in what follows from other fields (`defaults.py`); a
command that loads models adds the sandbox's files and a cutoff that is a number
(`scoring/resolve.py`), and the result has this type: no null where one of these promised a value.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

from denserl_cli.core.recipe.schema import (
    Interpolation,
    NormalizerConfig,
    NormalizerKind,
    PPOConfig,
    Recipe,
    SegmentationConfig,
)


@dataclass(frozen=True, kw_only=True)
class ResolvedSegmentation(SegmentationConfig):
    """Where one reward ends and the next begins, with a cutoff that is a number."""

    cutoff: float | None
    """Nats; null where no cutoff decides."""


@dataclass(frozen=True, kw_only=True)
class ResolvedNormalizer(NormalizerConfig):
    """The normaliser, with its kind."""

    kind: NormalizerKind


@dataclass(frozen=True, kw_only=True)
class ResolvedPPO(PPOConfig):
    """PPO, with the fields that a granularity or a reward decides where a recipe does not."""

    value_clip: float | Literal["none"]
    interpolation: Interpolation


@dataclass(frozen=True, kw_only=True)
class ResolvedRecipe(Recipe):
    """One experiment, ready to work on."""

    segmentation: ResolvedSegmentation
    normalizer: ResolvedNormalizer
    ppo: ResolvedPPO
    knows_true_reward: bool
    """The prompts are the embedded task's own, whose true reward is known."""


def as_resolved(recipe: Recipe, *, knows_true_reward: bool) -> ResolvedRecipe:
    """The same recipe by its narrower type.

    Args:
        recipe: With the sandbox's files filled in and a cutoff that is a number.
        knows_true_reward: Whether the prompts are the embedded task's own.
    """
    if recipe.segmentation.cutoff == "auto":
        raise ValueError("the cutoff is calibrated before a recipe is resolved")
    blocks = {
        "segmentation": ResolvedSegmentation(**_values(recipe.segmentation)),
        "normalizer": ResolvedNormalizer(**_values(recipe.normalizer)),
        "ppo": ResolvedPPO(**_values(recipe.ppo)),
        "knows_true_reward": knows_true_reward,
    }
    return ResolvedRecipe(**{**_values(recipe), **blocks})


def _values(block: Any) -> dict[str, Any]:
    return {field.name: getattr(block, field.name) for field in fields(block)}
