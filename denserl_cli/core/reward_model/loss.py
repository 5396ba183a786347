"""The segment reward model: a scalar head at every token, segment rewards, their loss."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from denserl_cli.core.errors import DenserlError
from denserl_cli.core.models.causal_lm import compute_dtype, hidden_states, load_weights
from denserl_cli.core.precision import at_least_float32
from denserl_cli.core.recipe.schema import SegmentationConfig
from denserl_cli.core.system.files import write_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from denserl_cli.core.chat.format import ChatFormat
    from denserl_cli.core.data.encoding import SequenceBatch
    from denserl_cli.core.recipe.schema import Granularity, ModelConfig, Recipe

RECORD = "denserl.json"
"""File in a reward model's folder that holds its `RewardRecord`."""


def aggregate_segments(
    token_values: Tensor, ends: Tensor, how: Literal["mean", "sum", "last"] = "mean"
) -> Tensor:
    """Score each sequence by the rewards of its segments, the values at their ends (method §3).

    token_values: (B, T), the reward head at every token. ends: (B, T) bool. Returns (B,), at least
    float32; a row without ends scores 0, with gradient 0. Raises DenserlError for an unknown `how`.
    """
    values = at_least_float32(token_values)
    if how == "last":
        ends = ends & (ends.cumsum(1) == ends.sum(1, keepdim=True))
    elif how not in ("mean", "sum"):
        raise DenserlError(f"unknown aggregation {how!r}", hint="use mean, sum or last")
    total = values.masked_fill(~ends, 0).sum(1)
    return total / ends.sum(1).clamp(min=1) if how == "mean" else total


def preference_loss(
    chosen_score: Tensor, rejected_score: Tensor, margin: Tensor | None = None
) -> Tensor:
    """Bradley-Terry loss -log σ(chosen - rejected - margin), mean over pairs (method §3).

    chosen_score, rejected_score, margin: (pairs,). Returns a scalar, at least float32; 0 of no
    pairs.
    """
    difference = at_least_float32(chosen_score) - rejected_score
    if margin is not None:
        difference = difference - margin
    return -logsigmoid(difference).sum() / max(len(difference), 1)


def check_finite(score: float, origin: str) -> None:
    """Raise DenserlError for a score that is not a number. origin: what was scored."""
    if not math.isfinite(score):
        raise DenserlError(
            f"{origin}: the reward model's score is {score}",
            hint="its weights are damaged or overflow; try --set model.dtype=float32",
        )


@dataclass(frozen=True)
class RewardRecord:
    """What belongs to a reward model beside its weights; travels in its folder.

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

    def save(self, folder: Path) -> None:
        """Write the record into a reward model's folder."""
        write_text(folder / RECORD, json.dumps({"schema": 1, **asdict(self)}, indent=2) + "\n")

    @classmethod
    def of(cls, recipe: Recipe, chat: ChatFormat) -> RewardRecord:
        """The record of a reward model trained by a recipe."""
        assert recipe.segmentation.cutoff != "auto", "an automatic cutoff is settled before"
        return cls(
            **recipe.segmentation.deciding(),
            aggregate=recipe.reward_model.aggregate,
            reference=recipe.model.path,
            revision=recipe.model.revision,
            tokenizer=recipe.model.tokenizer,
            terminator_id=chat.terminator_id,
            template_arguments=dict(recipe.chat.template_arguments),
        )

    @classmethod
    def published(cls, recipe: Recipe) -> RewardRecord:
        """The record of a recipe's published reward model; what nobody wrote down is the recipe's.

        Its terminator is not known yet.
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
        """Raise DenserlError when the recipe contradicts what the model was trained with.

        A cutoff that the recipe leaves to calibration is the model's.
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

    def check_terminator(self, chat: ChatFormat, folder: Path | str) -> None:
        """Raise DenserlError when responses end with another token than in training."""
        if chat.terminator_id != self.terminator_id:
            raise DenserlError(
                f"responses end with token {chat.terminator_id}, those that the reward model in "
                f"{folder} was trained on with {self.terminator_id}",
                hint="change chat.terminator back, or train another reward model",
            )


def load_scalar_model(
    model: ModelConfig,
    *,
    path: str | None = None,
    revision: str | None = None,
    fresh_head: bool,
    trained: bool,
    option: str = "model.path",
) -> PreTrainedModel:
    """A backbone with a scalar head (`score`, no bias), as reward model or critic (method §3).

    fresh_head: draw the head from torch's current seed, normal with std 1/(hidden+1); otherwise
    the folder must hold one, and DenserlError is raised when it does not.
    """
    from transformers import AutoModelForSequenceClassification

    loaded = load_weights(
        AutoModelForSequenceClassification,
        model,
        path or model.path,
        revision=revision,
        trained=trained,
        what="reward model",
        fresh="score" if fresh_head else None,
        dtype=torch.float32,
        num_labels=1,
        option=option,
    )
    head = getattr(loaded, "score", None)
    if not isinstance(head, nn.Linear) or head.bias is not None:
        raise DenserlError(
            f"{path or model.path}: the head of a {loaded.config.model_type} classifier is not a "
            "plain matrix product",
            hint="it can reward whole responses alone: segmentation.granularity=bandit",
        )
    if not trained:
        for weight in loaded.base_model.parameters():  # buffers, such as RoPE's, stay float32
            weight.data = weight.data.to(compute_dtype(model))
    if fresh_head:
        draw_head(loaded)
    return loaded


def draw_head(model: Any) -> None:
    """Draw the scalar head from torch's current seed: normal, std 1/(hidden+1) (method §3)."""
    nn.init.normal_(model.score.weight, std=1 / (model.score.in_features + 1))


def token_values(model: Any, batch: SequenceBatch, *, before: bool = False) -> Tensor:
    """The scalar head's value at every response token: (R, T) float32, 0 where masked.

    before: read at the position before each token, the state in which it is chosen (the critic).
    """
    states = hidden_states(model, batch)[batch.places - int(before)]
    with torch.autocast(states.device.type, enabled=False):  # the head stays float32
        # its weight is of another type only under DeepSpeed's bfloat16, which has float32 masters
        values = model.score(states.to(next(model.score.parameters()).dtype))[:, 0].float()
    return batch.window(values)
