"""A controlled task whose true reward is known: its tokenizer, its model and its data.

A prompt names a mood and a subject. A response is a sequence of phrases. The first word of a phrase
is a free choice and the words after it follow from it, so the entropy of a fitted model is high
exactly at the phrase boundaries. The worth of a phrase depends on the mood (the subject has no
effect), and the true reward of a response is the mean worth of its phrases. With several endings,
which all phrases share, the worth depends on beginning and ending together: each of them alone is
worth 0 on average over the others. Only tokenizer, model and data are special to the sandbox: the
stages that train on them are those that train any other model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from denserl_cli.core.errors import DenserlError

if TYPE_CHECKING:
    from denserl_cli.core.recipe.resolved import ResolvedRecipe
    from denserl_cli.core.recipe.schema import Recipe, SandboxConfig

MOODS = ("calm", "bright", "bitter", "proud")
SUBJECTS = (
    *("rivers", "winters", "journeys", "machines", "gardens", "cities", "letters", "harbours"),
    *("mountains", "songs", "markets", "storms", "islands", "bridges", "forests", "stars"),
)
STRAY_WORTH = -1.0
HABIT, TASTE = 0.8, 1.0
"""Std of the log-odds of choosing each phrase, in nats: the part that all responses of a mood share
(habit), and the part that is drawn for each response (taste)."""

TrueReward = Callable[[str, str], float]
"""The task's true reward of (prompt text, response text), where the task knows it."""


class Task:
    """The language of the sandbox and the worth of its phrases.

    Attributes:
        worth: (moods, phrases), the true reward of a phrase; mean 0 for each mood.
        habit: (moods, phrases), log-odds with which a mood's responses use the phrases, independent
            of their worth.
    """

    def __init__(self, config: SandboxConfig, seed: int) -> None:
        self.config = config
        self.phrases = _phrases(config)
        rng = np.random.default_rng([seed, 1])
        worth = rng.normal(size=(len(MOODS), len(self.phrases)))
        if config.endings > 1:
            pairs = worth.reshape(len(MOODS), config.phrases, config.endings)
            pairs = pairs - pairs.mean(2, keepdims=True)
            worth = (pairs - pairs.mean(1, keepdims=True)).reshape(worth.shape)
        self.worth = worth - worth.mean(1, keepdims=True)
        self.habit = HABIT * rng.normal(size=worth.shape)
        self._index = {phrase: k for k, phrase in enumerate(self.phrases)}

    @property
    def prompts(self) -> list[str]:
        """Every prompt there is."""
        return [f"write {mood} words about {subject}" for mood in MOODS for subject in SUBJECTS]

    @property
    def best(self) -> float:
        """The true reward of always choosing the best phrase, mean over the prompts."""
        return float(self.worth.max(1).mean())

    def compose(self, prompt: str, rng: np.random.Generator) -> str:
        """A random response of the least number of phrases, or up to a sixth more."""
        least = self.config.response_phrases
        size = rng.integers(least, least + least // 6 + 1)
        taste = np.exp(self.habit[_mood(prompt)] + TASTE * rng.normal(size=len(self.phrases)))
        chosen = rng.choice(len(self.phrases), size=size, p=taste / taste.sum())
        return " ".join(" ".join(self.phrases[k]) for k in chosen)

    def parse(self, response: str) -> list[tuple[int, int | None]]:
        """Split a response into (number of words, phrase), left to right; None is a stray word."""
        words, size, found, at = response.split(), self.config.phrase_length, [], 0
        while at < len(words):
            phrase = self._index.get(tuple(words[at : at + size]))
            length = 1 if phrase is None else size
            found.append((length, phrase))
            at += length
        return found

    def true_reward(self, prompt: str, response: str) -> float:
        """Mean worth of the response's phrases; a stray word counts -1, a missing phrase 0."""
        worth = self.worth[_mood(prompt)]
        parts = self.parse(response)
        total = sum(STRAY_WORTH if phrase is None else worth[phrase] for _, phrase in parts)
        return float(total / max(len(parts), self.config.response_phrases))


def _phrases(config: SandboxConfig) -> list[tuple[str, ...]]:
    """Every phrase: a beginning of its own and, where there are several, each of the endings."""
    size = config.phrase_length if config.endings == 1 else config.phrase_length - 1
    words = [_word(index) for index in range(config.phrases * size + config.endings)]
    begun = [tuple(words[k * size : (k + 1) * size]) for k in range(config.phrases)]
    if config.endings == 1:
        return begun
    return [(*beginning, word) for beginning in begun for word in words[-config.endings :]]


def true_reward(prompts: Sequence[str], responses: Sequence[str], recipe: Recipe) -> list[float]:
    """The true reward of each response, as a reward function (`ppo.rewards: true_reward`)."""
    if recipe.sandbox is None:
        raise DenserlError(
            "the reward true_reward is that of the embedded task, and the recipe has no sandbox",
            hint="name your own reward function, or train with a sandbox",
        )
    task = Task(recipe.sandbox, recipe.seed)
    known = set(task.prompts)
    if others := [prompt for prompt in prompts if prompt not in known]:
        raise DenserlError(
            f"the reward true_reward does not know the prompt {others[0]!r}",
            hint="it is that of the embedded task: leave data.prompts out",
        )
    return [task.true_reward(*pair) for pair in zip(prompts, responses, strict=True)]


def _mood(prompt: str) -> int:
    return MOODS.index(prompt.split()[1])


class Agreement(NamedTuple):
    """How well segment ends match the true phrase boundaries inside responses."""

    precision: float
    recall: float


def boundary_agreement(task: Task, responses: Sequence[tuple[str, Sequence[int]]]) -> Agreement:
    """Compare segment ends with the ends of the true phrases.

    Args:
        task: Knows the phrases.
        responses: Text of each and its segment ends, as word numbers (one word a token). The last
            end of a response is always right, so it does not count.
    """
    right = found = true = 0
    for text, ends in responses:
        boundaries = set(np.cumsum([length for length, _ in task.parse(text)])[:-1] - 1)
        inner = set(ends[:-1])
        right += len(boundaries & inner)
        found, true = found + len(inner), true + len(boundaries)
    return Agreement(right / max(found, 1), right / max(true, 1))


def _word(index: int) -> str:
    """A pronounceable made-up word of two syllables, different for every index below 4225."""
    syllables = [c + v for v in "aeiou" for c in "bdfgklmnprstv"]
    first = index % len(syllables)
    second = (17 * first + index // len(syllables) + 5) % len(syllables)
    return syllables[first] + syllables[second]


def true_reward_of(recipe: ResolvedRecipe) -> TrueReward | None:
    """The true reward of the embedded task, unless the recipe has other prompts."""
    if recipe.sandbox is None or not recipe.knows_true_reward:
        return None
    return Task(recipe.sandbox, recipe.seed).true_reward
