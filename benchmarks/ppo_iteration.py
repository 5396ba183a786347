"""One PPO iteration beside TRL's PPOTrainer: seconds, same models, same batches, skewed lengths.

    python benchmarks/ppo_iteration.py --tokenizer DIR --pairs train.jsonl --out runs/ppo-speed \
        [--model DIR] [--beside TREE] [--rounds 2] [--iterations 4] [--quick]

With `--model` everybody trains this model; without, a Llama of 4 layers and hidden size 256 that is
fitted for a moment to real answers cut to skewed lengths (log-normal), so that what it samples is
short, but for a few. With `--beside`, a folder with another state of this repository, that state
runs in TRL's place. Everybody samples 64 responses of at most 256 tokens an iteration, scores them
with policy, reference, reward model and critic, and updates policy and critic in 4 steps of 16, 8
at a time; learning rates are so small that lengths stay. The ways take turns, each in a process of
its own; the first iteration does not count. Each release of TRL is installed the first time, into
an environment of its own; where that fails its row says why.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.peers import Unavailable, measured, python_of

HERE = Path(__file__).resolve().parents[1]
PEERS = {"TRL 0.24": "trl-0.24.0", "TRL 1.12, experimental": "trl-1.12.0"}
OURS = {"denserl, bandit": "bandit", "denserl, segment": "segment"}
ROLLOUT, TRAIN, MICRO, EPOCHS, LEARNING_RATE = 64, 16, 8, 1, 1e-9
PROMPT, MEDIAN, SIGMA = 96, 30, 0.9
PLAIN = {"bf16": False, "gradient_checkpointing": False}


def main() -> None:
    """Measure in turns and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--pairs", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", type=Path, help="a real one, in place of the small Llama")
    parser.add_argument("--beside", type=Path, help="another tree of this repository")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--iterations", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--fit-steps", type=int, default=150)
    parser.add_argument("--quick", action="store_true", help="small numbers, to see that it works")
    asked = parser.parse_args()
    if asked.quick:
        asked.rounds, asked.iterations, asked.tokens = 1, 2, 64
        asked.hidden, asked.layers, asked.fit_steps = 32, 2, 20
    asked.out.mkdir(parents=True, exist_ok=True)
    asked.out = asked.out.absolute()
    stop = make_model(asked)
    peers = {} if asked.beside else PEERS
    before = {f"{name}, before": kind for name, kind in OURS.items()} if asked.beside else {}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in (*peers, *before, *OURS)}
    for turn in range(asked.rounds):
        for name, release in peers.items():
            found[name].append(peer(asked, release, stop))
        for name, granularity in before.items():
            found[name].append(own(asked, granularity, asked.beside))
        for name, granularity in OURS.items():
            found[name].append(own(asked, granularity, HERE))
        print(f"round {turn + 1} of {asked.rounds}", file=sys.stderr, flush=True)
    (asked.out / "results.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(table(found))


def make_model(asked: argparse.Namespace) -> int:
    """Model, prompts and pairs that all use; returns the token that ends a response."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from denserl_cli.core.chat.format import ChatFormat
    from denserl_cli.core.sandbox.language_model import fit_language_model

    tokenizer = AutoTokenizer.from_pretrained(asked.tokenizer)
    tokenizer.pad_token = tokenizer.unk_token  # TRL confuses padding with the end otherwise
    chat = ChatFormat.of(tokenizer)
    assert chat.terminator_id is not None
    rng = np.random.default_rng(0)
    prompts, sequences, pairs = [], [], []
    with asked.pairs.open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            prompt = row["chosen"][:-1]
            ids = chat.encode_prompt(prompt)
            if len(ids) > PROMPT or len(prompt) > 1:
                continue
            prompts.append(ids)
            for side in ("chosen", "rejected"):
                length = int(min(rng.lognormal(np.log(MEDIAN), SIGMA), asked.tokens - 1))
                answer = chat.encode_response(row[side][-1]["content"])[:-1][:length]
                sequences.append((ids, [*answer, chat.terminator_id]))
            pairs.append(json.dumps({side: row[side] for side in ("chosen", "rejected")}) + "\n")
    if asked.model:
        model = AutoModelForCausalLM.from_pretrained(asked.model)
    else:
        model = small_llama(asked, tokenizer, chat.terminator_id)
        fit_language_model(model, sequences, steps=asked.fit_steps, batch_size=16)
    model.save_pretrained(asked.out / "model")
    tokenizer.save_pretrained(asked.out / "model")
    text = "".join(json.dumps([int(i) for i in ids]) + "\n" for ids in prompts)
    (asked.out / "prompts.jsonl").write_text(text, encoding="utf-8")
    (asked.out / "pairs.jsonl").write_text("".join(pairs), encoding="utf-8")
    return int(chat.terminator_id)


def small_llama(asked: argparse.Namespace, tokenizer: Any, terminator_id: int) -> Any:
    """A model of random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=asked.hidden,
        intermediate_size=4 * asked.hidden,
        num_hidden_layers=asked.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=terminator_id,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config)


def peer(asked: argparse.Namespace, release: str, stop: int) -> Any:
    """The seconds of TRL's iterations, or why there are none."""
    case = {
        "model": str(asked.out / "model"),
        "tokenizer": asked.tokenizer,
        "prompts": str(asked.out / "prompts.jsonl"),
        "out": str(asked.out / "trl"),
        "experimental": release != "trl-0.24.0",
        "iterations": asked.iterations,
        "rollout": ROLLOUT,
        "train": TRAIN,
        "micro": MICRO,
        "epochs": EPOCHS,
        "tokens": asked.tokens,
        "stop": stop,
        "learning_rate": LEARNING_RATE,
        "options": PLAIN,
    }
    try:
        return measured(python_of(release), "peer_trl_ppo.py", case)
    except Unavailable as reason:
        return {"skipped": str(reason)}


def own(asked: argparse.Namespace, granularity: str, tree: Path) -> dict[str, Any]:
    """The seconds of our iterations and their phases, through the commands."""
    recipe, run = asked.out / f"{granularity}.yaml", asked.out / f"run-{granularity}"
    cutoff = {"cutoff": 3.0} if granularity == "segment" else {}
    settings = {
        "model": {
            "path": str(asked.out / "model"),
            "gradient_checkpointing": False,
            "dtype": asked.dtype,
        },
        "segmentation": {"granularity": granularity, **cutoff},
        "data": {
            "preferences": [{"path": str(asked.out / "pairs.jsonl"), "max_samples": 200}],
            "eval_pairs": 0,
            "prompts": [str(asked.out / "pairs.jsonl")],
            "eval_prompts": 0,
            "max_length": PROMPT + asked.tokens,
            "max_prompt_length": PROMPT,
        },
        "reward_model": {"epochs": 0.1, "batch_size": 8},
        "normalizer": {"pairs": 100},
        "ppo": {
            "iterations": asked.iterations,
            **rollout(asked, tree),
            "train_batch_size": TRAIN,
            "micro_batch_size": MICRO,
            "epochs": EPOCHS,
            "max_prompt_length": PROMPT,
            "actor_learning_rate": LEARNING_RATE,
            "critic_learning_rate": LEARNING_RATE,
        },
        "run": {"log_samples": 0},
    }
    recipe.write_text(yaml.safe_dump(settings), encoding="utf-8")
    shutil.rmtree(run, ignore_errors=True)
    environment = {**os.environ, "PYTHONPATH": str(tree.absolute())}
    for stage in ("train-rm", "fit-function", "train-ppo"):
        command = [sys.executable, "-m", "denserl_cli.app", stage, "--recipe", str(recipe)]
        command += ["--out", str(run)]
        # python -m puts the working folder before PYTHONPATH
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tree)
        if done.returncode:
            raise SystemExit(f"{stage} in {tree}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [one for one in map(json.loads, lines) if one["stage"] == "train-ppo" and one["step"]]
    names = [name for name in steps[0] if name.endswith("seconds")]
    phases = {name: [step[name] for step in steps[1:]] for name in names}
    return {**phases, "length": statistics.mean(step["response_length"] for step in steps)}


def rollout(asked: argparse.Namespace, tree: Path) -> dict[str, Any]:
    """The settings of rollouts, by the names that a tree has for them."""
    if (tree / "denserl_cli/core/sampling").exists():
        names = {"batch_size": ROLLOUT, "micro_batch_size": ROLLOUT}
        return {"rollout": {**names, "max_new_tokens": asked.tokens}}
    names = {"rollout_batch_size": ROLLOUT, "rollout_micro_batch_size": ROLLOUT}
    return {**names, "max_new_tokens": asked.tokens}


def table(found: dict[str, list[dict[str, Any]]]) -> str:
    """Medians over all iterations, and how many times each way is as fast as each release."""
    taken = {
        name: statistics.median(second for one in rounds for second in one["seconds"])
        for name, rounds in found.items()
        if all("seconds" in one for one in rounds)
    }
    peers = [name for name in taken if name not in OURS]
    lines = ["| | seconds an iteration | " + " | ".join(f"× {name}" for name in peers) + " |"]
    lines.append("|---" * (2 + len(peers)) + "|")
    for name, rounds in found.items():
        if name not in taken:
            lines.append(f"| {name} | skipped: {rounds[0]['skipped']} |" + " – |" * len(peers))
            continue
        ratios = "".join(f" {taken[other] / taken[name]:.2f} |" for other in peers)
        lines.append(f"| {name} | {taken[name]:.2f} |{ratios}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
