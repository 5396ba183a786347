"""TRL's RewardTrainer for `reward_training.py`; runs in TRL's environment and prints JSON."""

from __future__ import annotations

import json
import resource
import sys
import time
from typing import Any


def main() -> None:
    """Train some steps; prints the real and padded tokens and the seconds of each."""
    case = json.loads(sys.argv[1])
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import RewardConfig, RewardTrainer
    from trl.trainer.reward_trainer import DataCollatorForPreference

    clock = time.process_time if case["cpu_time"] else time.perf_counter
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(case["model"])
    with open(case["pairs"], encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    steps: list[dict[str, float]] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            steps.append({"began": clock()})

        def on_step_end(self, *_: Any, **__: Any) -> None:
            steps[-1]["seconds"] = clock() - steps[-1].pop("began")

    class Counting(DataCollatorForPreference):  # type: ignore[misc]
        def torch_call(self, examples: Any) -> Any:
            batch = super().torch_call(examples)
            counted.append((int(batch["attention_mask"].sum()), batch["attention_mask"].numel()))
            return batch

    counted: list[tuple[int, int]] = []
    trainer = RewardTrainer(
        model=case["model"],
        args=RewardConfig(
            output_dir=case["out"],
            per_device_train_batch_size=case["batch"],
            max_steps=case["steps"],
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
            seed=0,
            **case["options"],
        ),
        train_dataset=Dataset.from_list(
            [{k: row[k] for k in ("chosen", "rejected", "length")} for row in rows]
        ),
        processing_class=tokenizer,
        callbacks=[Clock()],
    )
    trainer.data_collator = Counting(pad_token_id=trainer.data_collator.pad_token_id)
    trainer.train()
    taken = [step["seconds"] for step in steps]
    tokens = counted[: len(taken)]
    found = {
        "seconds": taken,
        "tokens": [t for t, _ in tokens],
        "padded": [p for _, p in tokens],
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
