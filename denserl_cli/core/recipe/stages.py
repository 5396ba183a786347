"""What a stage is: what it reads, what it leaves, what it is configured by."""

from __future__ import annotations

_PAIRS = tuple(
    f"data.{name}"
    for name in ("preferences", "evaluation", "eval_pairs", "max_length", "max_prompt_length",
                 "strict")
)  # fmt: skip


_COMMON = ("name", "seed", "sandbox", "model", "lora", "chat", "segmentation")


READS: dict[str, tuple[str, ...]] = {
    "train-rm": (*_COMMON, *_PAIRS, "optimizer", "reward_model"),
    "fit-function": (*_COMMON, *_PAIRS, "normalizer"),
    "train-ppo": (*_COMMON, "data.prompts", "data.eval_prompts", "data.strict", "optimizer",
                  "normalizer.kind", "ppo"),
}  # fmt: skip
"""The settings that decide what a stage computes; in the order in which the stages run."""


_MEMORY = (
    "model.gradient_checkpointing",
    "reward_model.micro_batch_size",
    "normalizer.batch_size",
    "ppo.micro_batch_size",
    "ppo.rollout_micro_batch_size",
)
"""Settings among these that decide about memory and rounding alone, so they may change."""


RESULTS = {
    "train-rm": ("reward_model",),
    "fit-function": ("reward_model/normalizer.json", "reward_model/normalizer.png"),
    "train-ppo": ("policy", "policy_best"),
}
"""What each stage leaves in the run folder."""


MEMORY_FIELDS = {
    "train-rm": ("reward_model.micro_batch_size", "data.max_length", "data.max_prompt_length"),
    "fit-function": ("normalizer.batch_size", "data.max_length", "data.max_prompt_length"),
    "train-ppo": (
        "ppo.micro_batch_size",
        "ppo.rollout_micro_batch_size",
        "ppo.max_new_tokens",
        "ppo.max_prompt_length",
    ),
    "evaluate-rm": ("reward_model.micro_batch_size", "data.max_length"),
    "evaluate-policy": ("ppo.rollout_micro_batch_size", "ppo.max_new_tokens"),
}
"""What decides how much memory a stage takes, beside the model."""
