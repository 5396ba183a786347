"""train-rm: Bradley-Terry, or Plackett-Luce, on segment rewards (method §3)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from denserl_cli.core.chat.decoding import segment_values
from denserl_cli.core.data.arrow_rows import PairRows, sequences_of
from denserl_cli.core.data.batches import (
    EncodedPairRow,
    SequenceBatch,
    collate_sides,
    forward_passes,
    margins,
    pair_batches,
)
from denserl_cli.core.data.packing import pack_sides, side_batches
from denserl_cli.core.models.device import device
from denserl_cli.core.models.scalar_head import token_values
from denserl_cli.core.reward_model.metrics import (
    Metrics,
    length_effect,
    preference_metrics,
    to_numbers,
)
from denserl_cli.core.reward_model.objective import objective_of
from denserl_cli.core.reward_model.training import STAGE, ScalarTrainer
from denserl_cli.core.scoring.scorer import Scorer
from denserl_cli.core.scoring.segment_cache import open_cache
from denserl_cli.core.segmentation import aggregate_segments
from denserl_cli.core.system.distributed import (
    all_reduce_sum,
    shard_micro_batches,
    world_size,
)

__all__ = ["STAGE", "RewardTrainer"]

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from denserl_cli.core.observer import Observer
    from denserl_cli.core.recipe.resolved import ResolvedRecipe
    from denserl_cli.core.runs.folder import RunFolder


class RewardTrainer(ScalarTrainer[PairRows]):
    """Trains a reward model on preference pairs (method §3)."""

    unit, cuts = "pairs", True

    def __init__(
        self,
        recipe: ResolvedRecipe,
        run: RunFolder,
        observer: Observer,
        *,
        rows: PairRows,
        evaluation: PairRows,
        batches: Sequence[np.ndarray],
        tokenizer: PreTrainedTokenizerBase,
        pad_id: int,
    ) -> None:
        """Load the models.

        Args:
            recipe: Whose reward model is trained.
            run: Its folder.
            observer: Told progress and metrics.
            rows: Pairs to train on.
            evaluation: Held-out pairs.
            batches: Row numbers of each step's pairs.
            tokenizer: Decodes samples, and responses where segments depend on their text.
            pad_id: Token that fills batches up.
        """
        self.objective = objective_of(recipe.reward_model, (rows, evaluation))
        super().__init__(
            recipe,
            run,
            observer,
            rows=rows,
            evaluation=evaluation,
            batches=batches,
            tokenizer=tokenizer,
            pad_id=pad_id,
        )
        self.sequences = sequences_of(rows)
        self.scorer = Scorer(recipe.segmentation, reference=self.reference, tokenizer=tokenizer)
        self.segments = None
        if self.reference is not None:
            self.segments = open_cache(rows, recipe, self.scorer, observer)
        self.evaluation_ends: list[Tensor] = []

    def parts(self, indices: np.ndarray) -> list[np.ndarray]:
        """The pairs of each micro-batch, of similar length."""
        tokens = self.sequences.tokens[indices]
        return pair_batches(tokens, indices, self.settings.micro_batch_size)

    def count(self, rows: np.ndarray) -> int:
        """Pairs: metrics are means over them."""
        return len(rows)

    def micro_batch(self, part: np.ndarray, beside: Sequence[np.ndarray]) -> Metrics:
        """Loss and metrics of one micro-batch; arguments of `passes`."""
        return self.forward(part, self.passes(part, beside))

    def passes(self, pairs: np.ndarray, beside: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The sequences of each forward pass of a micro-batch, as `collate_sides` counts them.

        Args:
            pairs: Row numbers of its pairs.
            beside: Those of the other processes' micro-batches.
        """
        lengths = [self.sequences.lengths[self.sequences.of(one)] for one in (pairs, *beside)]
        return [np.arange(len(lengths[0]))] if self.packs else forward_passes(*lengths)

    def forward(self, pairs: np.ndarray, cut: Sequence[np.ndarray]) -> Metrics:
        """Loss and metrics of one micro-batch.

        Args:
            pairs: Row numbers of its pairs.
            cut: Of `passes`.
        """
        rows = [self.rows[i] for i in pairs]
        numbers = self.sequences.of(pairs)
        scores, segments = [], []
        for part in cut:
            batch = self.collate(rows, part)
            ends = self.segment(batch, numbers[part])
            scores.append(self.scores(batch, ends))
            segments.append(ends.sum(1))
        order = torch.from_numpy(np.argsort(np.concatenate(cut))).to(ends.device)
        margin = margins(rows, ends.device)
        ordered = torch.cat(scores)[order], torch.cat(segments)[order]
        return preference_metrics(*ordered, margin, self.objective, self.sequences.others[pairs])

    def collate(self, rows: Sequence[EncodedPairRow], numbers: Iterable[int]) -> SequenceBatch:
        """The batch of some sequences of pairs, packed or padded; arguments of `collate_sides`."""
        together = pack_sides if self.packs else collate_sides
        return together(rows, numbers, self.pad_id, device())

    def segment(self, batch: SequenceBatch, numbers: np.ndarray) -> Tensor:
        """Segment ends of training sequences.

        Args:
            batch: Of R sequences.
            numbers: (R,), the numbers of the sequences, as `collate_sides` counts them.

        Returns:
            (R, T) bool.
        """
        return self.scorer(batch).ends if self.segments is None else self.segments(batch, numbers)

    def scores(self, batch: SequenceBatch, ends: Tensor) -> Tensor:
        """The score of each response, (R,). ends: (R, T) bool, of its segments."""
        values = self.engine(token_values, batch)
        return aggregate_segments(values, ends, self.settings.aggregate)

    @torch.no_grad()
    def evaluate(self) -> dict[str, Any]:
        """The metrics of `forward` on the evaluation pairs, and the effect of length."""
        if not self.evaluation:
            return {}
        model = self.engine.model
        held = sequences_of(self.evaluation)
        count = len(held.lengths)
        parts = side_batches(held, 2 * self.settings.micro_batch_size, packed=self.packs)
        observer = self.session.observer
        observer.begin("evaluate", total=count)
        model.eval()
        found = torch.zeros(2, count, device=device())
        scores, segments = found
        for turn, (part, counts) in enumerate(shard_micro_batches(parts)):
            batch = self.collate(*held.part(self.evaluation, part))
            if turn == len(self.evaluation_ends):  # the same batches every time
                self.evaluation_ends.append(self.scorer(batch).ends)
            ends = self.evaluation_ends[turn]
            rows = torch.from_numpy(part).to(ends.device)
            scores[rows] += self.scores(batch, ends) * counts
            segments[rows] += ends.sum(1) * counts
            observer.advance(len(part) * world_size())
        model.train()
        observer.end()
        all_reduce_sum(found)
        margin = margins(self.evaluation, device())
        metrics = preference_metrics(scores, segments, margin, self.objective, held.others)
        named = to_numbers(list(metrics), torch.stack(list(metrics.values())))
        better, worse = held.pairs().T
        numbers, lengths = scores.double().cpu().numpy(), held.responses
        effect = length_effect(numbers[better] - numbers[worse], lengths[better] - lengths[worse])
        return {
            **{f"eval_{name}": value for name, value in named.items()},
            "eval_longer_accuracy": effect.longer_accuracy,
            "eval_length_correlation": effect.correlation,
            "eval_lengths": [asdict(one) for one in effect.bins],
        }

    @torch.no_grad()
    def samples(self) -> list[dict[str, Any]]:
        """Best and worst response of one row, always the same, with their segments' values."""
        if not self.log_samples:
            return []
        row = (self.evaluation or self.rows)[0]
        batch = self.collate([row], (0, 1))
        self.engine.model.eval()
        ends = self.scorer(batch).ends
        values = self.engine(token_values, batch)
        self.engine.model.train()
        scores = aggregate_segments(values, ends, self.settings.aggregate).tolist()
        prompt = self.tokenizer.decode(row.prompt, skip_special_tokens=True)
        shown = []
        for side, label in enumerate(("chosen", "rejected")):
            segments = segment_values(
                self.tokenizer,
                getattr(row, label),
                torch.nonzero(ends[side])[:, 0].tolist(),
                values[side].tolist(),
            )
            shown.append(
                {"prompt": prompt, "label": label, "score": scores[side], "segments": segments}
            )
        return shown

    def tokens(self, indices: np.ndarray) -> int:
        """Tokens of a global batch, all responses, without padding."""
        return int(self.sequences.tokens[indices].sum())

    def responses(self, indices: np.ndarray) -> int:
        """Responses of a global batch, all of its pairs and rankings."""
        return len(self.sequences.of(indices))

    def kept(self, indices: np.ndarray) -> dict[str, Any]:
        """A batch in a form that torch.save can write for inspection."""
        rows, names = [self.rows[i] for i in indices], ("prompt", "chosen", "rejected")
        ids = {name: [torch.from_numpy(getattr(row, name)) for row in rows] for name in names}
        others = [[torch.from_numpy(one) for one in row.others] for row in rows]
        return {"origin": [row.origin for row in rows], **ids, "others": others}
