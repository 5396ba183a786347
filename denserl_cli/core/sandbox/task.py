"""A controlled task whose true reward is known: its tokenizer, its model and its data.

A prompt names a mood and a subject. A response strings together phrases; the first word of a phrase
is a free choice, the words after it follow from it, so that a fitted model is surprised exactly at
the phrase boundaries. The mood decides what each phrase is worth (the subject matters to nobody),
and the true reward of a response is the mean worth of its phrases. With several endings, which all
phrases share, the worth lies in beginning and ending together: each of them is worth nothing on
average over the others. Only tokenizer, model and data are the sandbox's own: what learns from them
are the stages that train any other model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from denserl_cli.core.errors import DenserlError
from denserl_cli.core.observer import Observer
from denserl_cli.core.system.files import replaced_folder, write_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from denserl_cli.core.recipe.schema import Recipe, SandboxConfig

MOODS = ("calm", "bright", "bitter", "proud")
SUBJECTS = (
    *("rivers", "winters", "journeys", "machines", "gardens", "cities", "letters", "harbours"),
    *("mountains", "songs", "markets", "storms", "islands", "bridges", "forests", "stars"),
)
STRAY_WORTH = -1.0
HABIT, TASTE = 0.8, 1.0
"""How unevenly phrases are used by all responses of a mood, and by one response beside them: std of
the log-odds of choosing each phrase, in nats."""
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


class Slots(NamedTuple):
    """Where the sandbox keeps what it made."""

    model: Path
    preferences: Path
    prompts: Path
    settings: Path

    @classmethod
    def of(cls, folder: Path) -> Slots:
        """The files of the sandbox in `folder`."""
        names = ("model", "preferences.jsonl", "prompts.jsonl", "settings.json")
        return cls(*(folder / name for name in names))


class Task:
    """The language of the sandbox and the worth of its phrases.

    worth: (moods, phrases), the true reward of a phrase; mean 0 for each mood. habit: of the same
    shape, log-odds with which a mood's responses use the phrases, independent of their worth.
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
        """A response with a taste of its own, up to a sixth more than the least number long."""
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
    """The true reward of each response, as a reward function (`ppo.reward: true_reward`)."""
    if recipe.sandbox is None:
        raise DenserlError(
            "the reward true_reward is that of the embedded task, and the recipe has no sandbox",
            hint="name a reward of your own, or train with a sandbox",
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
    """How well found segment ends match the true phrase boundaries inside responses."""

    precision: float
    recall: float


def boundary_agreement(task: Task, responses: Sequence[tuple[str, Sequence[int]]]) -> Agreement:
    """Compare segment ends (word numbers, one word a token) with the ends of true phrases.

    responses: text and ends of each. The last end of a response is given, so it does not count.
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


def build_tokenizer(task: Task) -> PreTrainedTokenizerBase:
    """One token a word, with chat markers and a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = ["<|pad|>", "<|unknown|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
    words = {"write", "words", "about", *MOODS, *SUBJECTS, *(w for p in task.phrases for w in p)}
    vocabulary = {token: index for index, token in enumerate([*specials, *sorted(words)])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unknown|>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|pad|>",
        unk_token="<|unknown|>",
        eos_token="<|end|>",
        extra_special_tokens=["<|system|>", "<|user|>", "<|assistant|>"],
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def build_model(config: SandboxConfig, vocabulary: int) -> PreTrainedModel:
    """A small Llama; its random weights come from torch's current seed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=config.hidden_size,
            intermediate_size=2 * config.hidden_size,
            num_hidden_layers=config.layers,
            num_attention_heads=max(1, config.hidden_size // 16),
            max_position_embeddings=4096,
            tie_word_embeddings=False,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=5,
        )
    )


def fit_language_model(
    model: PreTrainedModel,
    sequences: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    steps: int,
    batch_size: int = 32,
    learning_rate: float = 3e-3,
    seed: int = 0,
    observer: Observer | None = None,
) -> None:
    """Fit a small model to (prompt ids, response ids) in place: plain next-token training.

    The loss covers the responses. Random weights have an entropy near log V everywhere, so a model
    made from a configuration needs this before segments mean anything (method §2).
    """
    import torch
    from transformers import get_cosine_schedule_with_warmup

    from denserl_cli.core.data.encoding import collate_sequences
    from denserl_cli.core.models.causal_lm import response_logprobs

    observer = observer or Observer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
    rng = np.random.default_rng(seed)
    observer.begin("fit the starting model", total=steps)
    for step in range(steps):
        chosen = [sequences[i] for i in rng.integers(len(sequences), size=batch_size)]
        batch = collate_sequences([p for p, _ in chosen], [r for _, r in chosen], pad_id=0)
        logprobs = response_logprobs(model, batch, with_entropy=False).logprobs
        loss = -logprobs.sum() / batch.response_mask.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            observer.advance(loss=loss.item())
        else:
            observer.advance()
    observer.end()


def make(config: SandboxConfig, folder: Path, *, seed: int, observer: Observer) -> Slots:
    """Write model, tokenizer, preference pairs and prompts to `folder`, unless they are there."""
    slots = Slots.of(folder)
    if folder.is_dir():
        return slots
    task = Task(config, seed)
    with replaced_folder(folder) as aside:
        settings = {"seed": seed, **asdict(config)}
        write_text(aside / slots.settings.name, json.dumps(settings) + "\n")
        _write_model(task, aside / slots.model.name, seed=seed, observer=observer)
        rng = np.random.default_rng([seed, 2])
        pairs = [_pair(task, rng) for _ in range(config.pairs)]
        write_text(aside / slots.preferences.name, _jsonl(pairs))
        prompts = [{"prompt": prompt} for prompt in task.prompts]
        write_text(aside / slots.prompts.name, _jsonl(prompts))
    return slots


def _write_model(task: Task, folder: Path, *, seed: int, observer: Observer) -> None:
    import torch

    from denserl_cli.core.chat.format import ChatFormat

    tokenizer = build_tokenizer(task)
    chat = ChatFormat.of(tokenizer)
    rng = np.random.default_rng([seed, 3])
    texts = [(prompt, task.compose(prompt, rng)) for _ in range(32) for prompt in task.prompts]
    sequences = [
        (chat.encode_prompt([{"role": "user", "content": p}]), chat.encode_response(r))
        for p, r in texts
    ]
    torch.manual_seed(seed)
    model = build_model(task.config, len(tokenizer))
    fit_language_model(model, sequences, steps=task.config.fit_steps, seed=seed, observer=observer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _pair(task: Task, rng: np.random.Generator) -> dict[str, object]:
    """Two responses to one prompt, ordered by a noisy Bradley-Terry choice on the true reward."""
    prompt = task.prompts[rng.integers(len(task.prompts))]
    first, second = task.compose(prompt, rng), task.compose(prompt, rng)
    gap = task.true_reward(prompt, first) - task.true_reward(prompt, second)
    odds = gap / task.config.label_temperature
    if rng.random() > 0.5 * (1 + math.tanh(odds / 2)):  # the logistic function, without overflow
        first, second = second, first
    user = {"role": "user", "content": prompt}
    return {
        "chosen": [user, {"role": "assistant", "content": first}],
        "rejected": [user, {"role": "assistant", "content": second}],
    }


def _jsonl(rows: Sequence[Mapping[str, object]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)
