"""TRL's PPOTrainer for `ppo_iteration.py`; runs in TRL's environment and prints JSON."""

from __future__ import annotations

import json
import sys
import time
from itertools import pairwise
from typing import Any


def main() -> None:
    """Train some iterations; prints the seconds of each."""
    case = json.loads(sys.argv[1])
    import torch
    from datasets import Dataset
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        TrainerCallback,
    )

    if case["experimental"]:
        from trl.experimental.ppo import PPOConfig, PPOTrainer
    else:
        from trl import PPOConfig, PPOTrainer

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(case["tokenizer"], padding_side="left")
    tokenizer.pad_token = tokenizer.unk_token
    ended: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ended.append(time.perf_counter())

    def model(kind: Any, **options: Any) -> Any:
        return kind.from_pretrained(case["model"], dtype=torch.float32, **options)

    settings = PPOConfig(
        output_dir=case["out"],
        per_device_train_batch_size=case["micro"],
        gradient_accumulation_steps=case["rollout"] // case["micro"],
        num_mini_batches=case["rollout"] // case["train"],
        local_rollout_forward_batch_size=case["rollout"],
        num_ppo_epochs=case["epochs"],
        total_episodes=case["rollout"] * case["iterations"],
        response_length=case["tokens"],
        stop_token_id=case["stop"],
        temperature=1.0,
        learning_rate=case["learning_rate"],
        missing_eos_penalty=None,
        num_sample_generations=0,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        seed=0,
        **case["options"],
    )
    with open(case["prompts"], encoding="utf-8") as lines:
        prompts = Dataset.from_list([{"input_ids": json.loads(line)} for line in lines])
    trainer = PPOTrainer(
        args=settings,
        processing_class=tokenizer,
        model=model(AutoModelForCausalLM),
        ref_model=model(AutoModelForCausalLM),
        reward_model=model(AutoModelForSequenceClassification, num_labels=1),
        value_model=model(AutoModelForSequenceClassification, num_labels=1),
        train_dataset=prompts,
        eval_dataset=prompts,
        callbacks=[Clock()],
    )
    trainer.train()
    print(json.dumps({"seconds": [b - a for a, b in pairwise(ended)]}))


if __name__ == "__main__":
    main()
