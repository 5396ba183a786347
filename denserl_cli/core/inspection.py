"""segment: how the reference model cuts responses and what the reward model gives each piece."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from denserl_cli.core import sandbox
from denserl_cli.core.adopting import adopt, load_reward_model, reward_record
from denserl_cli.core.data import collate_sequences, micro_batches, read_pairs
from denserl_cli.core.errors import DenserlError
from denserl_cli.core.fitting import load_normalizer
from denserl_cli.core.materials import load_chat, with_sandbox
from denserl_cli.core.policy import compute_dtype, device, load_causal_lm
from denserl_cli.core.reward_model import aggregate_segments
from denserl_cli.core.scoring import ScoredBatch, Scorer
from denserl_cli.core.segmentation import calibrate_cutoff
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


class Inspector:
    """The reference of a recipe with, once it is trained, the run's reward model.

    rewards: False leaves the reward model out, and with it what it demands of the recipe.
    """

    def __init__(
        self, recipe: Recipe, run: RunFolder, observer: Observer, *, rewards: bool = True
    ) -> None:
        asked, recipe = recipe, with_sandbox(recipe, run, observer)
        self.recipe = recipe
        self.tokenizer, self.chat = load_chat(recipe)
        self.normalizer: LocationNormalizer | None = None
        reward_model = None
        if rewards and run.reward_model.is_dir():
            record = adopt(reward_record(asked, run), recipe, run, self.chat, observer)
            reward_model = load_reward_model(record, recipe, run)
            if run.normalizer.exists():
                self.normalizer = load_normalizer(recipe, run)
        self.scorer = Scorer(
            recipe.segmentation,
            reference=load_causal_lm(recipe.model, trained=False),
            reward_model=reward_model,
            dtype=compute_dtype(recipe.model),
        )

    def segment(self, answers: Sequence[Answer]) -> list[SegmentedResponse]:
        """Segment the last turn of each conversation."""
        encoded = [self._encode(answer) for answer in answers]
        shown: list[SegmentedResponse | None] = [None] * len(answers)
        lengths = np.array([len(prompt) + len(response) for prompt, response in encoded])
        for part in micro_batches(lengths, np.arange(len(answers)), BATCH):
            scored = self._score([encoded[i] for i in part])
            for row, i in enumerate(part):
                shown[i] = self._describe(answers[i], encoded[i][1], scored, row)
        return [response for response in shown if response is not None]

    def calibrate(self, answers: Sequence[Answer], length: float) -> float:
        """The cutoff that cuts these answers into segments of `length` tokens on average."""
        encoded = [self._encode(answer) for answer in answers]
        width = max(len(response) for _, response in encoded)
        entropy, mask = torch.zeros(len(encoded), width), torch.zeros(len(encoded), width).bool()
        lengths = np.array([len(prompt) + len(response) for prompt, response in encoded])
        for part in micro_batches(lengths, np.arange(len(encoded)), BATCH):
            scored = self._score([encoded[i] for i in part])
            assert scored.entropy is not None
            rows = torch.from_numpy(part)
            entropy[rows, : scored.entropy.shape[1]] = scored.entropy.float().cpu()
            for i in part:
                mask[i, : len(encoded[i][1])] = True
        terminated = torch.tensor([self._terminated(response) for _, response in encoded])
        return calibrate_cutoff(entropy, mask, length, terminated)

    def _encode(self, answer: Answer) -> tuple[np.ndarray, np.ndarray]:
        """Prompt and response ids within the limits; a response that is cut keeps no terminator."""
        data = self.recipe.data
        *prompt, last = answer.messages
        response = self.chat.encode_response(last["content"])
        ids = self.chat.encode_prompt(prompt)
        if len(ids) + len(response) > data.max_length:
            ids = ids[-data.max_prompt_length :]
            response = response[: data.max_length - len(ids)]
        return np.array(ids), np.array(response)

    def _score(self, encoded: Sequence[tuple[np.ndarray, np.ndarray]]) -> ScoredBatch:
        batch = collate_sequences(
            [prompt for prompt, _ in encoded],
            [response for _, response in encoded],
            self.chat.pad_id,
            device(),
        )
        terminated = [self._terminated(response) for _, response in encoded]
        return self.scorer(batch, torch.tensor(terminated, device=device()))

    def _terminated(self, response: np.ndarray) -> bool:
        """Whether a response has kept its terminator."""
        return int(response[-1]) == self.chat.terminator_id

    def _describe(
        self, answer: Answer, ids: np.ndarray, scored: ScoredBatch, row: int
    ) -> SegmentedResponse:
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
        return SegmentedResponse(answer.label, answer.messages[-2]["content"], segments, score)


def answers_of(recipe: Recipe, limit: int, observer: Observer) -> list[Answer]:
    """Both sides of up to `limit` usable pairs, drawn from each source of preference data."""
    if not recipe.data.preferences:
        raise DenserlError("no data to segment", hint="give --text, --file or --data")
    drawn = [
        replace(source, max_samples=min(4 * limit, source.max_samples or 4 * limit))
        for source in recipe.data.preferences
    ]
    pairs = read_pairs(
        drawn, seed=recipe.seed, strict=recipe.data.strict, notice=observer.notice
    ).pairs[:limit]
    return [
        Answer(f"{pair.origin} {side}", messages)
        for pair in pairs
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
        "granularity": recipe.segmentation.granularity,
        "cutoff": recipe.segmentation.cutoff,
        "responses": [asdict(response) for response in responses],
    }
