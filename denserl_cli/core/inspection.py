"""segment: how the reference model cuts responses and what the reward model gives each piece."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from denserl_cli.core import sandbox
from denserl_cli.core.adapters import load_reference
from denserl_cli.core.adopting import load_reward_model, open_reward_model
from denserl_cli.core.cutoffs import calibrate, sample_pairs, settled
from denserl_cli.core.data import collate_sequences, micro_batches
from denserl_cli.core.errors import DenserlError
from denserl_cli.core.fitting import load_normalizer
from denserl_cli.core.materials import load_chat, with_sandbox
from denserl_cli.core.policy import compute_dtype, device
from denserl_cli.core.reward_model import aggregate_segments, check_finite
from denserl_cli.core.scoring import ScoredBatch, Scorer
from denserl_cli.core.text import segment_texts

if TYPE_CHECKING:
    from denserl_cli.core.normalizer import LocationNormalizer
    from denserl_cli.core.recipe.schema import Recipe
    from denserl_cli.core.run import RunFolder
    from denserl_cli.core.tracking import Observer

BATCH = 16


@dataclass(frozen=True)
class Answer:
    """A conversation whose last turn is to be segmented, and what to call it."""

    label: str
    messages: list[dict[str, str]]


@dataclass(frozen=True)
class Segment:
    """One segment: response tokens start … end (inclusive).

    entropy: nats after its last token, None where the response is over. value: the reward model's,
    reward: normalised by location; None without a reward model or normaliser.
    """

    text: str
    start: int
    end: int
    entropy: float | None
    value: float | None
    reward: float | None


@dataclass(frozen=True)
class SegmentedResponse:
    """A response in segments, and the score that the reward model gives it."""

    label: str
    prompt: str
    segments: list[Segment]
    score: float | None


class EncodedAnswer(NamedTuple):
    """An answer as ids within the length limits; a response that was cut keeps no terminator."""

    answer: Answer
    prompt: np.ndarray
    response: np.ndarray
    truncated: bool

    @property
    def length(self) -> int:
        """Tokens of prompt and response."""
        return len(self.prompt) + len(self.response)


class Inspector:
    """The reference of a recipe with, once it is trained, the run's reward model.

    rewards: False leaves the reward model out, and with it what it demands of the recipe.
    scoring: rewards are all that is wanted. There must be a reward model, the run's own or a
    published one, and the reference is left out where no segment depends on it.
    """

    def __init__(
        self,
        recipe: Recipe,
        run: RunFolder,
        observer: Observer,
        *,
        rewards: bool = True,
        scoring: bool = False,
    ) -> None:
        self.normalizer: LocationNormalizer | None = None
        opened = None
        if scoring or (rewards and run.reward_model.is_dir()):
            opened = open_reward_model(recipe, run, observer)
            self.recipe, self.chat = opened.recipe, opened.reading
        else:
            self.recipe = settled(with_sandbox(recipe, run, observer), run, observer)
            _, self.chat = load_chat(self.recipe)
        self.tokenizer, recipe = self.chat.template.tokenizer, self.recipe
        segmented = recipe.segmentation.by_entropy
        foreign = opened is not None and opened.reading is not opened.chat
        reference = load_reference(recipe) if segmented or not (scoring or foreign) else None
        reward_model = None
        if opened is not None:
            assert opened.record is not None
            reward_model = load_reward_model(
                opened.record, recipe, run, observer=observer, reference=reference
            )
            if run.normalizer.exists():
                self.normalizer = load_normalizer(recipe, run)
        self.scorer = Scorer(
            recipe.segmentation,
            reference=reference,
            reward_model=reward_model,
            dtype=compute_dtype(recipe.model),
            tokenizer=self.tokenizer,
        )

    def segment(self, answers: Sequence[Answer]) -> list[SegmentedResponse]:
        """Segment the last turn of each conversation."""
        return self.segment_encoded([self.encode(answer) for answer in answers])

    def segment_encoded(self, encoded: Sequence[EncodedAnswer]) -> list[SegmentedResponse]:
        """Segment answers that are ids already.

        Raises DenserlError for a score that is not a number, which comes from a broken model.
        """
        shown: list[SegmentedResponse | None] = [None] * len(encoded)
        lengths = np.array([one.length for one in encoded])
        for part in micro_batches(lengths, np.arange(len(encoded)), BATCH):
            scored = self._score([encoded[i] for i in part])
            for row, i in enumerate(part):
                shown[i] = self._describe(encoded[i], scored, row)
        return [response for response in shown if response is not None]

    def calibrate(self, answers: Sequence[Answer], length: float) -> float:
        """The cutoff that cuts these answers into segments of `length` tokens on average."""
        encoded = [self.encode(answer) for answer in answers]
        return calibrate(
            self.scorer,
            [one.prompt for one in encoded],
            [one.response for one in encoded],
            [self._terminated(one.response) for one in encoded],
            length=length,
            pad_id=self.chat.pad_id,
        ).cutoff

    def encode(self, answer: Answer) -> EncodedAnswer:
        """Ids within the limits. Raises DenserlError for what the chat template cannot write."""
        data = self.recipe.data
        *prompt, last = answer.messages
        response = self.chat.encode_response(last["content"])
        ids = self.chat.encode_prompt(prompt)
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

    def _describe(self, encoded: EncodedAnswer, scored: ScoredBatch, row: int) -> SegmentedResponse:
        answer, ids = encoded.answer, encoded.response
        ends = torch.nonzero(scored.ends[row])[:, 0].tolist()
        starts = [0, *(end + 1 for end in ends[:-1])]
        entropy = None if scored.entropy is None else scored.entropy[row].tolist()
        values = None if scored.token_values is None else scored.token_values[row].tolist()
        segments = []
        texts = segment_texts(self.tokenizer, ids, ends)
        for k, (text, start, end) in enumerate(zip(texts, starts, ends, strict=True)):
            value = None if values is None else values[end]
            reward = None
            if value is not None and self.normalizer is not None:
                p = (k + 1) / len(ends)
                reward = (value - self.normalizer.mean(p)) / self.normalizer.std(p)
            surprise = entropy[end] if entropy is not None and end < len(ids) - 1 else None
            segments.append(Segment(text, start, end, surprise, value, reward))
        score = None
        if scored.token_values is not None:
            how = self.recipe.reward_model.aggregate
            one = slice(row, row + 1)
            score = aggregate_segments(scored.token_values[one], scored.ends[one], how).item()
            check_finite(sum(s.value or 0.0 for s in segments), answer.label)
        return SegmentedResponse(answer.label, answer.messages[-2]["content"], segments, score)


def answers_of(recipe: Recipe, limit: int, observer: Observer) -> list[Answer]:
    """Both sides of up to `limit` usable pairs, drawn from each source of preference data."""
    if not recipe.data.preferences:
        raise DenserlError("no data to segment", hint="give --text, --file or --data")
    return [
        Answer(f"{pair.origin} {side}", messages)
        for pair in sample_pairs(recipe, limit, observer)
        for side, messages in (("chosen", pair.chosen), ("rejected", pair.rejected))
    ]


def phrase_agreement(recipe: Recipe, responses: Sequence[SegmentedResponse]) -> sandbox.Agreement:
    """How well the segments of sandbox responses match the true phrases."""
    assert recipe.sandbox is not None
    found = [
        (" ".join(s.text.strip() for s in response.segments), [s.end for s in response.segments])
        for response in responses
    ]
    return sandbox.boundary_agreement(sandbox.Task(recipe.sandbox, recipe.seed), found)


def as_document(recipe: Recipe, responses: Sequence[SegmentedResponse]) -> dict[str, Any]:
    """What `denserl segment --json` prints."""
    return {
        **recipe.segmentation.deciding(),
        "responses": [asdict(response) for response in responses],
    }
