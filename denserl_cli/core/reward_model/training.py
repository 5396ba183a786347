"""What the trainers of a reward model share: models, the loop of steps, one optimizer step."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from denserl_cli.core.data.arrow_rows import PairRows, StepRows
from denserl_cli.core.engine.base import step as engine_step
from denserl_cli.core.engine.factory import freeze, make_engine, placement
from denserl_cli.core.models.lora import load_reference, new_scalar_model
from denserl_cli.core.models.packing_support import packs
from denserl_cli.core.observer import throughput
from denserl_cli.core.recipe.stages import TRAIN_RM as STAGE
from denserl_cli.core.reward_model.metrics import Metrics, is_number, to_numbers
from denserl_cli.core.runs.stage_session import StageSession
from denserl_cli.core.system.distributed import all_reduce_sum, rounds, shard_micro_batches

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from denserl_cli.core.observer import Observer
    from denserl_cli.core.recipe.resolved import ResolvedRecipe
    from denserl_cli.core.runs.folder import RunFolder

HEADLINE = (
    *("loss", "accuracy", "segments_per_response"),
    *("tokens_per_second", "responses_per_second"),
)
"""The metrics shown beside the progress bar; metrics.jsonl has all metrics."""

RowsT = TypeVar("RowsT", PairRows, StepRows)


class ScalarTrainer(ABC, Generic[RowsT]):
    """Trains a model with a scalar head on rows of one kind; `train` is the algorithm.

    Metrics of a batch are means over what its rows count (`counts`): pairs, or labelled steps.
    """

    unit: ClassVar[str]
    """What the summary calls its rows."""
    cuts: ClassVar[bool]
    """Whether rows are cut into the recipe's segments."""

    def __init__(
        self,
        recipe: ResolvedRecipe,
        run: RunFolder,
        observer: Observer,
        *,
        rows: RowsT,
        evaluation: RowsT,
        batches: Sequence[np.ndarray],
        tokenizer: PreTrainedTokenizerBase,
        pad_id: int,
    ) -> None:
        """Load the models.

        Args:
            recipe: Whose reward model is trained.
            run: Its folder.
            observer: Told progress and metrics.
            rows: Rows to train on.
            evaluation: Held-out rows.
            batches: Row numbers of each step.
            tokenizer: Decodes samples, and responses where segments depend on their text.
            pad_id: Token that fills batches up.
        """
        self.settings = recipe.reward_model
        self.rows: RowsT = rows
        self.evaluation: RowsT = evaluation
        self.batches = batches
        self.tokenizer, self.pad_id = tokenizer, pad_id
        self.log_samples = recipe.run.log_samples
        engine = self.settings.engine
        reference = None
        if self.cuts and recipe.segmentation.by_entropy:
            reference = load_reference(recipe, placement(recipe, engine, trained=False))
        self.engine = make_engine(
            recipe,
            engine,
            new_scalar_model(recipe, reference, placement(recipe, engine, trained=True)),
            learning_rate=self.settings.learning_rate,
            total_steps=len(batches),
        )
        self.reference = None if reference is None else freeze(reference, recipe, engine)
        models = (self.engine,) if self.reference is None else (self.engine, self.reference)
        self.packs = packs(models, recipe.model.packing, observer)
        self.session = StageSession(
            STAGE,
            run,
            observer,
            engines={"engine": self.engine},
            unit="step",
            total=len(batches),
            save_every=self.settings.save_every,
            headline=HEADLINE,
        )

    def train(self, start: int) -> None:
        """Take every step after `start`, with checkpoints and evaluations."""
        total = len(self.batches)
        self.session.observer.begin("train the reward model", total=total, done=start)
        with self.session.steps(start) as steps:
            for step in steps:
                began = time.perf_counter()
                indices = self.batches[step - 1]
                metrics = self.update(step, indices)
                seconds = time.perf_counter() - began
                metrics |= throughput(seconds, self.tokens(indices), self.responses(indices))
                evaluates = step % self.settings.eval_every == 0 or step == total
                if evaluates:
                    metrics |= self.evaluate()
                samples = self.samples() if evaluates or step == 1 else []
                if self.session.finish_step(step, metrics, samples):
                    break

    def update(self, step: int, indices: np.ndarray) -> dict[str, Any]:
        """One optimizer step on one global batch, in micro-batches of similar length.

        Args:
            step: Its number, from 1.
            indices: Row numbers of the batch.

        Returns:
            Metrics of the step.
        """
        totals: list[Tensor] = []
        learning_rate = self.engine.learning_rate
        parts, total = self.parts(indices), self.count(indices)
        mine = list(zip(shard_micro_batches(parts), rounds(parts), strict=True))
        for number, ((part, counts), beside) in enumerate(mine, 1):
            metrics = self.micro_batch(part, beside)
            weight = self.count(part) * counts
            self.engine.backward(metrics["loss"] * weight / total, last=number == len(mine))
            totals.append(torch.stack([v.detach() for v in metrics.values()]) * weight)
        norm = math.nan
        with self.session.guard.update(step, lambda: self.kept(indices)):
            norm = engine_step(self.engine)[0].item()
        means = all_reduce_sum(torch.stack(totals).sum(0)) / total
        return {
            **to_numbers(list(metrics), means),
            "gradient_norm": norm,
            "learning_rate": learning_rate,
        }

    def summary(self) -> dict[str, Any]:
        """The summary of the finished stage."""
        last = self.session.run.metrics(STAGE)[-1]
        evaluated = {k: v for k, v in last.items() if k.startswith("eval_") and is_number(v)}
        return {"steps": len(self.batches), self.unit: len(self.rows), **evaluated}

    @abstractmethod
    def parts(self, indices: np.ndarray) -> list[np.ndarray]:
        """The row numbers of each micro-batch of a global batch."""

    @abstractmethod
    def count(self, rows: np.ndarray) -> int:
        """Over how many things the metrics of some rows are means."""

    @abstractmethod
    def micro_batch(self, part: np.ndarray, beside: Sequence[np.ndarray]) -> Metrics:
        """Loss and metrics of one micro-batch.

        Args:
            part: Its row numbers.
            beside: Those of the other processes' micro-batches.
        """

    @abstractmethod
    def evaluate(self) -> dict[str, Any]:
        """Metrics on the evaluation rows."""

    @abstractmethod
    def samples(self) -> list[dict[str, Any]]:
        """Responses with their segments' values."""

    @abstractmethod
    def tokens(self, indices: np.ndarray) -> int:
        """Tokens of a global batch, without padding."""

    @abstractmethod
    def responses(self, indices: np.ndarray) -> int:
        """Responses of a global batch."""

    @abstractmethod
    def kept(self, indices: np.ndarray) -> dict[str, Any]:
        """A batch in a form that torch.save can write for inspection."""
