"""Reads responses with the reference and the reward model, for `denserl segment` and `score`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch

from denserl_cli.core.chat.decoding import token_texts
from denserl_cli.core.data.batches import collate_sequences, micro_batches
from denserl_cli.core.engine.factory import freeze
from denserl_cli.core.errors import DenserlError
from denserl_cli.core.inspection.traces import Cut, SegmentedResponse, Trace
from denserl_cli.core.models.device import device
from denserl_cli.core.models.lora import load_reference
from denserl_cli.core.models.scalar_head import token_values
from denserl_cli.core.observer import Observer
from denserl_cli.core.sandbox import task as sandbox
from denserl_cli.core.scoring.calibration import (
    Calibration,
    calibrate,
    sample_pairs,
)
from denserl_cli.core.scoring.loading import load_reward_model
from denserl_cli.core.scoring.resolve import load_normalizer, prepare
from denserl_cli.core.scoring.scorer import ReadValues, ScoredBatch, Scorer, check_finite

if TYPE_CHECKING:
    from denserl_cli.core.normalizer import LocationNormalizer
    from denserl_cli.core.recipe.schema import Recipe
    from denserl_cli.core.runs.folder import RunFolder

BATCH = 16


@dataclass(frozen=True)
class Answer:
    """A conversation whose last turn is segmented. label: its name for people."""

    label: str
    messages: list[dict[str, str]]
    side: Literal["", "chosen", "rejected"] = ""
    """Which side of a pair it is, if it is one."""


class EncodedAnswer(NamedTuple):
    """An answer as token ids within the length limits; a truncated response has no terminator."""

    answer: Answer
    prompt: np.ndarray
    response: np.ndarray
    truncated: bool

    @property
    def length(self) -> int:
        """Tokens of prompt and response."""
        return len(self.prompt) + len(self.response)


class Inspector:
    """Segments responses with a recipe's reference and scores them with the run's reward model."""

    def __init__(
        self,
        recipe: Recipe,
        run: RunFolder,
        observer: Observer,
        *,
        rewards: bool = True,
        scoring: bool = False,
    ) -> None:
        """Load the models.

        Args:
            recipe: As it was loaded.
            run: May have a reward model.
            observer: Told what is loaded, and when a conversation is too long.
            rewards: Use the run's reward model if there is one; the recipe must not contradict it.
            scoring: Rewards are all that is needed. There must be a reward model, the run's own or
                a published one, and the reference is loaded only if segments depend on it.

        Raises:
            DenserlError: A model cannot be loaded, or the recipe contradicts the reward model.
        """
        self.normalizer: LocationNormalizer | None = None
        scored = scoring or (rewards and run.reward_model.is_dir())
        setup = prepare(recipe, run, observer, reward_model=scored)
        self.recipe, self.chat = setup.recipe, setup.reward_chat_format
        self.tokenizer, recipe = self.chat.template.tokenizer, self.recipe
        segmented = recipe.segmentation.by_entropy
        foreign = setup.reward_chat_format is not setup.chat
        reference = load_reference(recipe) if segmented or not (scoring or foreign) else None
        reward_model = None
        read: ReadValues = token_values
        if setup.record is not None:
            model, read = load_reward_model(
                setup.record, recipe, run, observer=observer, reference=reference
            )
            reward_model = freeze(model, recipe)
            if run.normalizer.exists():
                self.normalizer = load_normalizer(recipe, run)
        self.scorer = Scorer(
            recipe.segmentation,
            reference=None if reference is None else freeze(reference, recipe),
            reward_model=reward_model,
            read=read,
            tokenizer=self.tokenizer,
        )
        self.cut = Cut.of(recipe, self.normalizer)

    def segment(self, answers: Sequence[Answer]) -> list[SegmentedResponse]:
        """Segment the last turn of each conversation."""
        return self.segment_encoded([self.encode(answer) for answer in answers])

    def segment_encoded(self, encoded: Sequence[EncodedAnswer]) -> list[SegmentedResponse]:
        """Segment answers that are encoded already. Raises as `trace` does."""
        return [self.cut(trace) for trace in self.trace(encoded)]

    def trace(
        self, encoded: Sequence[EncodedAnswer], observer: Observer | None = None
    ) -> list[Trace]:
        """Entropy and value of each token.

        Raises DenserlError for a number that is not finite, which comes from a damaged model.
        """
        observer = observer or Observer()
        traces: list[Trace | None] = [None] * len(encoded)
        lengths = np.array([one.length for one in encoded])
        observer.begin("read responses", len(encoded))
        for part in micro_batches(lengths, np.arange(len(encoded)), BATCH):
            scored = self._score([encoded[i] for i in part])
            for row, i in enumerate(part):
                traces[i] = self._trace(encoded[i], scored, row)
            observer.advance(len(part))
        observer.end()
        return [trace for trace in traces if trace is not None]

    def calibrate(self, answers: Sequence[Answer], length: float) -> Calibration:
        """The cutoff that cuts these answers into segments of about `length` tokens on average."""
        encoded = [self.encode(answer) for answer in answers]
        return calibrate(
            self.scorer,
            [one.prompt for one in encoded],
            [one.response for one in encoded],
            [self._terminated(one.response) for one in encoded],
            length=length,
            pad_id=self.chat.pad_id,
        )

    def encode(self, answer: Answer) -> EncodedAnswer:
        """Token ids within the limits. Raises DenserlError where the chat template refuses."""
        data = self.recipe.data
        ids, response = self.chat.encode_answer(answer.messages)
        truncated = len(ids) + len(response) > data.max_length
        if truncated:
            ids = ids[-data.max_prompt_length :]
            response = response[: data.max_length - len(ids)]
        return EncodedAnswer(answer, np.array(ids), np.array(response), truncated)

    def _score(self, encoded: Sequence[EncodedAnswer]) -> ScoredBatch:
        batch = collate_sequences(
            [one.prompt for one in encoded],
            [one.response for one in encoded],
            self.chat.pad_id,
            device(),
        )
        terminated = [self._terminated(one.response) for one in encoded]
        return self.scorer(batch, torch.tensor(terminated, device=device()))

    def _terminated(self, response: np.ndarray) -> bool:
        """Whether a response has kept its terminator."""
        return int(response[-1]) == self.chat.terminator_id

    def _trace(self, encoded: EncodedAnswer, scored: ScoredBatch, row: int) -> Trace:
        answer, ids = encoded.answer, encoded.response
        entropy, values = (
            None if found is None else found[row, : len(ids)].float().cpu().numpy()
            for found in (scored.entropy, scored.token_values)
        )
        if values is not None:
            check_finite(float(values.sum()), answer.label)
        if entropy is not None and not np.isfinite(entropy).all():
            raise DenserlError(
                f"{answer.label}: the reference's entropy is not a number",
                hint="its weights are damaged or overflow; try --set model.dtype=float32",
            )
        return Trace(
            answer.label,
            answer.side,
            answer.messages[-2]["content"],
            self._terminated(ids),
            token_texts(self.tokenizer, ids),
            scored.ends[row, : len(ids)].cpu().numpy(),
            entropy,
            values,
        )


def answers_of(recipe: Recipe, limit: int, observer: Observer) -> list[Answer]:
    """Both sides (of rankings best and worst) of up to `limit` pairs, drawn from each source."""
    if not recipe.data.preferences:
        raise DenserlError("no data to segment", hint="give --text, --file or --data")
    return [
        answer
        for pair in sample_pairs(recipe, limit, observer)
        for answer in (
            Answer(f"{pair.origin} chosen", pair.chosen, "chosen"),
            Answer(f"{pair.origin} rejected", pair.rejected, "rejected"),
        )
    ]


def phrase_agreement(recipe: Recipe, responses: Sequence[SegmentedResponse]) -> sandbox.Agreement:
    """How well the segments of the sandbox's responses match the true phrases."""
    assert recipe.sandbox is not None
    found = [
        (" ".join(s.text.strip() for s in response.segments), [s.end for s in response.segments])
        for response in responses
    ]
    return sandbox.boundary_agreement(sandbox.Task(recipe.sandbox, recipe.seed), found)


def as_document(cut: Cut, responses: Sequence[SegmentedResponse]) -> dict[str, Any]:
    """What `denserl segment --json` prints."""
    return {
        "granularity": cut.granularity,
        "cutoff": cut.cutoff,
        "cut": cut.rule,
        "responses": [asdict(response) for response in responses],
    }
