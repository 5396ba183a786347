"""The embedded task's tokenizer and starting model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from denserl_cli.core.observer import Observer
from denserl_cli.core.sandbox.task import MOODS, SUBJECTS, Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from denserl_cli.core.recipe.schema import SandboxConfig


TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


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
            num_attention_heads=config.heads or max(1, config.hidden_size // 16),
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
    """Fit a small model to sequences, in place, by next-token prediction of the responses.

    Random weights have an entropy near log V everywhere, so segments mean nothing before a model
    is fitted (method §2).

    Args:
        model: A causal language model.
        sequences: Prompt ids and response ids of each.
        steps: Optimizer steps.
        batch_size: Sequences of a step.
        learning_rate: The highest, after the warm-up.
        seed: Of the order of the sequences.
        observer: Told progress.
    """
    import torch
    from transformers import get_cosine_schedule_with_warmup

    from denserl_cli.core.data.batches import collate_sequences
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


def write_model(task: Task, folder: Path, *, seed: int, observer: Observer) -> None:
    """Make the tokenizer, fit the starting model to the task's phrases, and save both."""
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
