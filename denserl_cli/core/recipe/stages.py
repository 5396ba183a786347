"""What a stage is: one row a stage, in the order in which the stages of training run.

Whatever differs from stage to stage and follows from its name alone is a column of this table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, get_args

StageName = Literal["train-rm", "fit-function", "train-ppo"]
"""The stages of training."""
TRAIN_RM: Final = "train-rm"
FIT_FUNCTION: Final = "fit-function"
TRAIN_PPO: Final = "train-ppo"
EVALUATE_RM: Final = "evaluate-rm"
EVALUATE_POLICY: Final = "evaluate-policy"
SEGMENT: Final = "segment"


@dataclass(frozen=True)
class Stage:
    """A command that works on a recipe: a stage of training, an evaluation, or `segment`."""

    name: str
    data: Literal["preferences", "evaluation", "prompts"]
    """The field of `data` that it reads and `--data` fills."""
    entry: str = ""
    """The function that does the work, `module:function`; `segment` does its own."""
    needs_data: bool = True
    """Whether that field must name something; the others can do without, or hold rows out."""
    emptied: tuple[str, ...] = ()
    """Fields of `data` that `--data` empties, because they belong to what it replaces."""
    block: Literal["reward_model", "ppo"] = "reward_model"
    """The block of the recipe whose engine it uses."""
    batch_size: str = ""
    """Field of the global batch of an optimizer step; empty where no weights are trained."""
    micro_batches: tuple[str, ...] = ()
    """Fields of what goes through a model at once; they decide about memory and rounding alone."""
    lengths: tuple[str, ...] = ()
    """Fields of the longest texts."""
    reads: tuple[str, ...] = ()
    """Fields and blocks that decide what it computes: a finished stage was made with these."""
    results: tuple[str, ...] = ()
    """What it leaves in the run folder."""
    subject: str = ""
    """What an evaluation judges, and the name of its metrics; empty for anything else."""

    @property
    def trains(self) -> bool:
        """Whether it trains weights, and so takes steps, logs metrics and writes checkpoints."""
        return bool(self.batch_size)

    @property
    def memory_fields(self) -> tuple[str, ...]:
        """Fields that decide how much memory it takes, beside the model."""
        return (*self.micro_batches, *self.lengths)


_COMMON = ("name", "seed", "sandbox", "model", "lora", "chat", "segmentation")
_PAIRS = (
    *("data.preferences", "data.evaluation", "data.eval_pairs", "data.max_length"),
    *("data.max_prompt_length", "data.strict"),
)
_PAIR_LENGTHS = ("data.max_length", "data.max_prompt_length")

_ROWS = (
    Stage(
        TRAIN_RM,
        data="preferences",
        entry="denserl_cli.core.stages.train_rm:train_reward_model",
        emptied=("evaluation",),
        batch_size="reward_model.batch_size",
        micro_batches=("reward_model.micro_batch_size",),
        lengths=_PAIR_LENGTHS,
        reads=(*_COMMON, *_PAIRS, "optimizer", "reward_model"),
        results=("reward_model",),
    ),
    Stage(
        FIT_FUNCTION,
        data="preferences",
        entry="denserl_cli.core.stages.fit_function:fit_normalizer",
        micro_batches=("normalizer.batch_size",),
        lengths=_PAIR_LENGTHS,
        reads=(*_COMMON, *_PAIRS, "normalizer"),
        results=("reward_model/normalizer.json", "reward_model/normalizer.png"),
    ),
    Stage(
        TRAIN_PPO,
        data="prompts",
        entry="denserl_cli.core.stages.train_ppo:train_policy",
        block="ppo",
        batch_size="ppo.train_batch_size",
        micro_batches=("ppo.micro_batch_size", "ppo.rollout.micro_batch_size"),
        lengths=("ppo.max_prompt_length", "ppo.rollout.max_new_tokens"),
        reads=(
            *(*_COMMON, "data.prompts", "data.eval_prompts", "data.strict", "optimizer"),
            *("normalizer.kind", "ppo"),
        ),
        results=("policy", "policy_best"),
    ),
    Stage(
        EVALUATE_RM,
        data="evaluation",
        entry="denserl_cli.core.evaluation.reward_model:evaluate_reward_model",
        needs_data=False,
        micro_batches=("reward_model.micro_batch_size",),
        lengths=("data.max_length",),
        subject="rm",
    ),
    Stage(
        EVALUATE_POLICY,
        data="prompts",
        entry="denserl_cli.core.evaluation.policy:evaluate_policy",
        block="ppo",
        micro_batches=("ppo.rollout.micro_batch_size",),
        lengths=("ppo.rollout.max_new_tokens",),
        subject="policy",
    ),
    Stage(SEGMENT, data="preferences", needs_data=False),
)

STAGES: dict[str, Stage] = {row.name: row for row in _ROWS}
"""Every row by its name."""
TRAINING: tuple[StageName, ...] = get_args(StageName)
"""The stages of training, in the order in which they run."""
CHANGEABLE = (
    "model.gradient_checkpointing",
    "ppo.rollout.rows",
    *(field for name in TRAINING for field in STAGES[name].micro_batches),
)
"""Fields that a stage reads and that may change when it is resumed: memory and rounding alone."""


def later_stages(stage: str) -> tuple[StageName, ...]:
    """The stages of training that build on a stage's results."""
    return TRAINING[TRAINING.index(stage) + 1 :]
