"""The record of a reward model's settings, which a recipe must not contradict."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from denserl_cli.core.errors import DenserlError
from denserl_cli.core.recipe.schema import SegmentationConfig
from denserl_cli.core.system.files import write_text

if TYPE_CHECKING:
    from denserl_cli.core.chat.format import ChatFormat
    from denserl_cli.core.recipe.resolved import ResolvedRecipe
    from denserl_cli.core.recipe.schema import Granularity, Recipe


RECORD = "denserl.json"
"""File in a reward model's folder that holds its `RewardRecord`."""


@dataclass(frozen=True)
class RewardRecord:
    """The settings that a reward model was trained with, kept in its folder.

    weights: hub name or folder of the weights where they are not in the record's own folder.
    """

    granularity: Granularity
    cutoff: float | None
    aggregate: str
    reference: str
    revision: str | None
    tokenizer: str | None
    terminator_id: int | None
    template_arguments: dict[str, Any]
    weights: str | None = None
    weights_revision: str | None = None
    cut: str = "entropy"
    quantile: float | None = None
    segment_length: float | None = None
    cut_seed: int | None = None
    answer_beginning: str | None = None
    """What prompts ended with beyond the template's generation prompt; null: not recorded."""

    def save(self, folder: Path) -> None:
        """Write the record into a reward model's folder."""
        write_text(folder / RECORD, json.dumps({"schema": 1, **asdict(self)}, indent=2) + "\n")

    @classmethod
    def of(cls, recipe: ResolvedRecipe, chat: ChatFormat) -> RewardRecord:
        """The record of a reward model trained by a recipe."""
        return cls(
            **recipe.segmentation.deciding(),
            aggregate=recipe.reward_model.aggregate,
            reference=recipe.model.path,
            revision=recipe.model.revision,
            tokenizer=recipe.model.tokenizer,
            terminator_id=chat.terminator_id,
            template_arguments=dict(recipe.chat.template_arguments),
            answer_beginning=chat.answer.beginning,
        )

    @classmethod
    def published(cls, recipe: Recipe) -> RewardRecord:
        """The record of a recipe's published reward model, which has none of its own.

        Settings that `published` does not give are the recipe's; the terminator is not known yet.
        """
        made = recipe.published
        assert made is not None
        cut = recipe.segmentation if made.cutoff is None else SegmentationConfig()
        made_for = {"granularity": made.granularity, "cutoff": made.cutoff}
        return cls(
            **{**cut.deciding(), **made_for},
            aggregate=recipe.reward_model.aggregate,
            reference=recipe.model.path,
            revision=recipe.model.revision,
            tokenizer=recipe.model.tokenizer,
            terminator_id=None,
            template_arguments=dict(recipe.chat.template_arguments),
            weights=made.reward_model,
            weights_revision=made.revision,
        )

    @classmethod
    def load(cls, folder: Path) -> RewardRecord:
        """Read a folder's record. Raises DenserlError when it is absent or damaged."""
        file = folder / RECORD
        try:
            fields = json.loads(file.read_text(encoding="utf-8"))
            schema = fields.pop("schema")
            if schema != 1:
                raise ValueError(f"schema {schema}, expected 1")
            return cls(**fields)
        except FileNotFoundError as error:
            raise DenserlError(
                f"no reward model in {folder}", hint="run denserl train-rm"
            ) from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DenserlError(
                f"{file} is damaged: {error}", hint="train the reward model again with --fresh"
            ) from error

    def check(self, recipe: Recipe, folder: Path | str) -> None:
        """Raise DenserlError, naming `folder`, when the recipe contradicts the record.

        A cutoff of `auto` contradicts no cutoff.
        """
        cut = recipe.segmentation
        if cut.cutoff == "auto" and self.cut == "entropy":
            cut = replace(cut, cutoff=self.cutoff)
        asked = {
            **{f"segmentation.{k}": (getattr(self, k), v) for k, v in cut.deciding().items()},
            "reward_model.aggregate": (self.aggregate, recipe.reward_model.aggregate),
            "model.path": (self.reference, recipe.model.path),
            "model.revision": (self.revision, recipe.model.revision),
            "model.tokenizer": (self.tokenizer, recipe.model.tokenizer),
            "chat.template_arguments": (
                self.template_arguments,
                dict(recipe.chat.template_arguments),
            ),
        }
        wrong = [
            f"{field} is {now}, the reward model was trained with {then}"
            for field, (then, now) in asked.items()
            if then != now
        ]
        if wrong:
            raise DenserlError(
                f"the recipe contradicts the reward model in {folder}: {'; '.join(wrong)}",
                hint="change the recipe back, or train a reward model for it in another folder",
            )

    def check_format(self, chat: ChatFormat, folder: Path | str) -> None:
        """Raise DenserlError when responses begin or end in another way than in training.

        What was not recorded is not compared.
        """
        begins, began = chat.answer.beginning, self.answer_beginning
        if began is not None and begins != began:
            raise DenserlError(
                f"prompts end with {begins!r} before an answer, those that the reward model in "
                f"{folder} was trained on with {began!r}",
                hint="change model.tokenizer or chat.template_arguments back, or train another "
                "reward model",
            )
        if self.terminator_id is not None and chat.terminator_id != self.terminator_id:
            raise DenserlError(
                f"responses end with token {chat.terminator_id}, those that the reward model in "
                f"{folder} was trained on with {self.terminator_id}",
                hint="change chat.terminator back, or train another reward model",
            )
