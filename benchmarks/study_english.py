"""A task over real English: a small model of its own on the beginnings of real answers.

Answers come from preference pairs of the user's; who preferred which does not matter. Tokenizer and
starting model are fitted to the first sentences of the answers, and the pairs are labelled anew by
a programmatic reward, `study_rewards.plain`, which also is the true reward.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.study_rewards import plain, sentences

VOCABULARY = 2048
WORDS = 60
"""An answer is cut behind the last sentence that ends within so many words."""
STEPS = 500


def make(pairs_file: Path, folder: Path, seed: int) -> None:
    """Write model, tokenizer, preference pairs and prompts to a folder, unless they are there."""
    import torch

    from denserl_cli.core.chat.format import ChatFormat
    from denserl_cli.core.recipe.schema import SandboxConfig
    from denserl_cli.core.sandbox.language_model import build_model, fit_language_model
    from denserl_cli.core.system.files import replaced_folder, write_text

    if folder.is_dir():
        return
    rows = read_rows(pairs_file)
    tokenizer = fit_tokenizer([text for row in rows for text in row.values()])
    chat = ChatFormat.of(tokenizer)
    sequences = [
        (chat.encode_prompt([_turn("user", row["prompt"])]), chat.encode_response(row[side]))
        for row in rows
        for side in ("chosen", "rejected")
    ]
    torch.manual_seed(seed)
    model = build_model(SandboxConfig(), len(tokenizer))
    fit_language_model(model, sequences, steps=STEPS, seed=seed)
    with replaced_folder(folder) as aside:
        model.save_pretrained(aside / "model")
        tokenizer.save_pretrained(aside / "model")
        pairs = [pair for row in rows if (pair := labelled(row))]
        write_text(aside / "pairs.jsonl", "".join(json.dumps(pair) + "\n" for pair in pairs))
        prompts = dict.fromkeys(row["prompt"] for row in rows)
        lines = [json.dumps({"prompt": prompt}) + "\n" for prompt in prompts]
        write_text(aside / "prompts.jsonl", "".join(lines))


def read_rows(file: Path) -> list[dict[str, str]]:
    """Short prompts with the beginnings of two answers that have at least two sentences each."""
    from denserl_cli.core.data.conversations import read_pairs
    from denserl_cli.core.recipe.schema import Source

    rows = []
    for pair in read_pairs([Source(str(file))], seed=0).pairs:
        prompt = pair.chosen[-2]["content"].strip()
        sides = [beginning(side[-1]["content"]) for side in (pair.chosen, pair.rejected)]
        if len(prompt.split()) <= 30 and all(len(sentences(side)) >= 2 for side in sides):
            rows.append({"prompt": prompt, "chosen": sides[0], "rejected": sides[1]})
    return rows


def beginning(text: str) -> str:
    """The first sentences of a text, `WORDS` words at most."""
    kept: list[str] = []
    for sentence in sentences(text.encode("ascii", "ignore").decode()):
        if sum(len(one.split()) for one in [*kept, sentence]) > WORDS:
            break
        kept.append(sentence)
    return "".join(kept).strip()


def labelled(row: dict[str, str]) -> dict[str, Any] | None:
    """A pair whose better answer is chosen; None where both are as good."""
    first, second = plain([row["chosen"], row["rejected"]])
    if first == second:
        return None
    better, worse = ("chosen", "rejected") if first > second else ("rejected", "chosen")
    user = _turn("user", row["prompt"])
    return {
        "chosen": [user, _turn("assistant", row[better])],
        "rejected": [user, _turn("assistant", row[worse])],
    }


def fit_tokenizer(texts: Sequence[str]) -> Any:
    """A byte-level BPE with the sandbox's chat template."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    from denserl_cli.core.sandbox.language_model import TEMPLATE

    specials = ["<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|other|>", "<|end|>"]
    backend = ByteLevelBPETokenizer()
    backend.train_from_iterator(
        texts, vocab_size=VOCABULARY, special_tokens=specials, show_progress=False
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend._tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        extra_special_tokens=["<|system|>", "<|user|>", "<|assistant|>"],
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}
