"""SmolLM2-135M-Instruct, where `benchmarks/real_model.py` has made it: exact on a real model."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from denserl_cli.core.chat.format import ChatFormat
from denserl_cli.core.models.lora import load_reference
from denserl_cli.core.observer import Observer
from denserl_cli.core.recipe import load_recipe
from denserl_cli.core.sampling.base import Sampling
from denserl_cli.core.stages.run import run_stage
from tests import tiny

CHAT = [
    {"role": "system", "content": "Answer in one sentence."},
    {"role": "user", "content": "What is a prime number?"},
    {"role": "assistant", "content": "A number with exactly two divisors."},
]


@pytest.fixture(scope="module")
def model() -> Path:
    """The folder of the model."""
    here = Path(__file__).resolve().parents[1] / "runs" / "real" / "model"
    folder = Path(os.environ.get("DENSERL_REAL_MODEL", here))
    if not (folder / "model.safetensors").is_file():
        pytest.skip(f"no model at {folder}: python benchmarks/real_model.py {folder}")
    return folder


def _written(model: Path) -> tuple[list[int], str]:
    """The conversation by transformers' own template, and the text of its answer."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    return tokenizer.apply_chat_template(CHAT, return_dict=False), CHAT[-1]["content"]


def test_a_conversation_has_the_ids_of_the_template(model: Path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    prompt, response = ChatFormat.of(tokenizer).encode_answer(CHAT)
    ids, text = _written(model)
    assert [*prompt, *response] == ids[: len(prompt) + len(response)]
    assert tokenizer.decode(response, skip_special_tokens=True) == text
    assert tokenizer.decode(ids[len(prompt) + len(response) :]).strip() == ""


def test_ten_greedy_tokens_are_those_of_transformers(model: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    chat = ChatFormat.of(AutoTokenizer.from_pretrained(model))
    prompts = [chat.encode_prompt(CHAT[:2]), chat.encode_prompt(CHAT[1:2])]
    theirs = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    expected = [
        theirs.generate(torch.tensor([ids]), max_new_tokens=10, do_sample=False)[0, len(ids) :]
        for ids in prompts
    ]
    ours = load_reference(
        load_recipe("smollm2-segment", [f"model.path={model}", "model.dtype=float32"])
    )
    greedy = Sampling(max_new_tokens=10, stop_ids=tuple(chat.stop_ids), temperature=0.0)
    found = tiny.sampler(ours, pad_id=chat.pad_id).sample(
        [np.array(ids) for ids in prompts], [(0,), (1,)], greedy
    )
    for response, tokens in zip(found, expected, strict=True):
        assert response.ids.tolist() == tokens.tolist()[: len(response.ids)]
        assert len(response.ids) == 10 or response.terminated


def test_a_step_of_training_and_its_segments(model: Path, shared: Path, tmp_path: Path):
    """train-rm reads real pairs in segments of the wanted length, and its loss falls on them."""
    lines = (shared / "data" / "preferences" / "train.jsonl").read_text().splitlines()
    short = [line for line in lines if sum(len(m["content"]) for m in _turns(line)) < 300][:12]
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("\n".join(short) + "\n")
    recipe = load_recipe(
        "smollm2-segment",
        [
            *(f"model.path={model}", f"data.preferences={pairs}", "data.eval_pairs=1"),
            *("reward_model.batch_size=8", "reward_model.epochs=3", "model.dtype=float32"),
            *("reward_model.learning_rate=2e-4", "optimizer.warmup_ratio=0"),
        ],
    )
    run_stage("train-rm", recipe, tmp_path / "run", "start", Observer())
    cutoff = json.loads((tmp_path / "run" / "cutoff.json").read_text())
    assert cutoff["segment_length"] == pytest.approx(8, abs=0.5)
    metrics = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    losses = [line["loss"] for line in metrics if "loss" in line]
    assert losses[0] == pytest.approx(0.69, abs=0.1)
    assert len(losses) == 4 and losses[-1] < losses[0] - 0.03


def _turns(line: str) -> list[dict[str, str]]:
    row = json.loads(line)
    return [*row["chosen"], *row["rejected"]]
