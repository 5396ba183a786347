"""Real tokenizers, real preference pairs, a small model: the whole pipeline through the commands.

For each tokenizer folder a small model of its family is built from the configuration class, fitted
as a language model on the data's own answers (random weights are surprised everywhere), and its
cutoff calibrated. Then train-rm, fit-function, train-ppo and segment run as a user would run them.

    python benchmarks/real_data.py --tokenizer phi3=DIR --tokenizer llama=DIR \
        --train train.jsonl --evaluation eval.jsonl --out runs/real-data [--quick]

Writes OUT/report.md: distribution of segment lengths, accuracy beside that of "prefer the longer".
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
)

from denserl_cli.core.chat.format import ChatFormat
from denserl_cli.core.data.conversations import read_pairs
from denserl_cli.core.data.encoding import encode_pairs
from denserl_cli.core.recipe.schema import Source
from denserl_cli.core.sandbox.language_model import fit_language_model
from denserl_cli.terminal.dashboard import make_observer

FAMILIES = {"phi3": (Phi3Config, Phi3ForCausalLM), "llama": (LlamaConfig, LlamaForCausalLM)}
SEGMENT_LENGTH = 6
FULL = {"pairs": 1000, "fit_steps": 250, "ppo_iterations": 4, "limit": 256}
QUICK = {"pairs": 200, "fit_steps": 40, "ppo_iterations": 1, "limit": 192}


def main() -> None:
    """Run every tokenizer that was named and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokenizer", action="append", required=True, metavar="FAMILY=DIR")
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--evaluation", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    size = QUICK if arguments.quick else FULL
    rows = []
    for named in arguments.tokenizer:
        family, _, folder = named.partition("=")
        rows.append(run_family(family, folder, arguments, size))
    report(rows, arguments.out / "report.md")


def run_family(
    family: str, tokenizer: str, arguments: argparse.Namespace, size: dict[str, int]
) -> dict[str, Any]:
    """The pipeline for one tokenizer; returns its figures."""
    out = arguments.out / family
    out.mkdir(parents=True, exist_ok=True)
    model, recipe = out / "model", out / f"{family}.yaml"
    if not model.exists():
        fit(family, tokenizer, arguments, size, model)
    write_recipe(recipe, model, arguments, size, cutoff=1.0)
    proposal = denserl("segment", recipe, out, "--calibrate", str(SEGMENT_LENGTH), "--json")
    cutoff = json.loads(proposal)["cutoff"]
    write_recipe(recipe, model, arguments, size, cutoff=round(cutoff, 4))
    times = {}
    for stage in ("train-rm", "fit-function", "train-ppo"):
        began = time.perf_counter()
        denserl(stage, recipe, out, "--resume")
        times[stage] = time.perf_counter() - began
    shown = json.loads(denserl("segment", recipe, out, "--limit", "100", "--json"))
    lengths = [
        segment["end"] - segment["start"] + 1
        for response in shown["responses"]
        for segment in response["segments"]
    ]
    summary = json.loads((out / "run" / "run.json").read_text())["stages"]["train-rm"]["summary"]
    return {"family": family, "cutoff": cutoff, "lengths": lengths, **times, **summary}


def fit(
    family: str,
    tokenizer_folder: str,
    arguments: argparse.Namespace,
    size: dict[str, int],
    folder: Path,
) -> None:
    """A small model of the family, fitted to the answers of the training pairs."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    chat = ChatFormat.of(tokenizer)
    pairs = read_pairs([Source(str(arguments.train), max_samples=size["pairs"])], seed=1).pairs
    with make_observer() as observer:
        rows = encode_pairs(
            chat, pairs, max_length=size["limit"], max_prompt_length=96, observer=observer
        ).rows
        sequences = [(row.prompt, side) for row in rows for side in (row.chosen, row.rejected)]
        torch.manual_seed(0)
        model = build(family, len(tokenizer), arguments.hidden, chat)
        fit_language_model(
            model,
            sequences,
            steps=size["fit_steps"],
            batch_size=8,
            learning_rate=3e-3,
            observer=observer,
        )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def build(family: str, vocabulary: int, hidden: int, chat: ChatFormat) -> PreTrainedModel:
    """A model of the family with random weights."""
    config, model = FAMILIES[family]
    return model(
        config(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=4 * hidden,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            pad_token_id=chat.pad_id,
            bos_token_id=None,
            eos_token_id=chat.terminator_id,
        )
    )


def write_recipe(
    file: Path, model: Path, arguments: argparse.Namespace, size: dict[str, int], cutoff: float
) -> None:
    """The recipe of one run: everything that a user would write for this model and data."""
    pairs = {"path": str(arguments.train), "max_samples": size["pairs"]}
    recipe = {
        "description": "a small model on real preference pairs",
        "model": {"path": str(model), "gradient_checkpointing": False},
        "segmentation": {"granularity": "segment", "cutoff": cutoff},
        "data": {
            "preferences": [pairs],
            "evaluation": [{"path": str(arguments.evaluation)}],
            "prompts": [dict(pairs)],
            "eval_prompts": 16,
            "max_length": size["limit"],
            "max_prompt_length": 96,
        },
        "reward_model": {
            "batch_size": 32,
            "micro_batch_size": 16,
            "learning_rate": 3e-4,
            "eval_every": 50,
            "save_every": 50,
        },
        "normalizer": {"pairs": 300, "batch_size": 16},
        "ppo": {
            "iterations": size["ppo_iterations"],
            "rollout": {"batch_size": 32, "micro_batch_size": 32, "max_new_tokens": 96},
            "train_batch_size": 16,
            "micro_batch_size": 8,
            "max_prompt_length": 96,
            "actor_learning_rate": 1e-5,
            "critic_learning_rate": 1e-4,
            "eval_every": 2,
            "save_every": 2,
        },
    }
    file.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")


def denserl(command: str, recipe: Path, out: Path, *arguments: str) -> str:
    """Run one denserl command as a user would; returns what it printed."""
    line = [sys.executable, "-m", "denserl_cli.app", command, "--recipe", str(recipe)]
    line += ["--out", str(out / "run"), *arguments]
    print("$", " ".join(["denserl", *line[3:]]), flush=True)
    return subprocess.run(line, check=True, stdout=subprocess.PIPE, text=True).stdout


def report(rows: list[dict[str, Any]], file: Path) -> None:
    """Write the tables and print them."""
    names = ("10 %", "median", "mean", "90 %", "longest")
    lines = ["| model | cutoff | segments |" + "".join(f" {n} |" for n in names)]
    lines.append("|" + "---|" * (3 + len(names)))
    for row in rows:
        lengths = np.array(row["lengths"])
        figures = [np.quantile(lengths, 0.1), np.median(lengths), lengths.mean()]
        figures += [np.quantile(lengths, 0.9), lengths.max()]
        cells = "".join(f" {figure:.1f} |" for figure in figures)
        lines.append(f"| {row['family']} | {row['cutoff']:.3f} | {len(lengths)} |{cells}")
    stages = ("train-rm", "fit-function", "train-ppo")
    lines += ["", "| model | accuracy | prefer the longer |" + "".join(f" {s} |" for s in stages)]
    lines.append("|" + "---|" * (3 + len(stages)))
    for row in rows:
        cells = "".join(f" {row[stage]:.0f} s |" for stage in stages)
        accuracy, longer = row["eval_accuracy"], row["eval_longer_accuracy"]
        lines.append(f"| {row['family']} | {accuracy:.3f} | {longer:.3f} |{cells}")
    text = "\n".join(lines) + "\n"
    file.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
