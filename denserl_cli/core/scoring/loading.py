"""The run's reward model and scorer, loaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from denserl_cli.core.errors import DenserlError
from denserl_cli.core.models.device import compute_dtype
from denserl_cli.core.models.lora import is_adapters, load_reference, saved_scalar_model
from denserl_cli.core.models.reward_metadata import RewardRecord
from denserl_cli.core.models.sequence_classifier import SequenceReward, has_plain_head, translating
from denserl_cli.core.scoring.resolve import _OPTION, RewardSetup
from denserl_cli.core.scoring.scorer import Scorer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from denserl_cli.core.data.conversations import Prompt
    from denserl_cli.core.observer import Observer
    from denserl_cli.core.recipe.schema import Recipe
    from denserl_cli.core.runs.folder import RunFolder


def load_reward_model(
    record: RewardRecord,
    recipe: Recipe,
    run: RunFolder,
    *,
    trained: bool = False,
    observer: Observer | None = None,
    reference: PreTrainedModel | None = None,
) -> PreTrainedModel | SequenceReward:
    """The run's reward model, frozen, or as the body of a critic to train.

    observer: told when a model of few positions has not read the whole of a conversation.
    reference: the recipe's starting model where it is loaded already; adapters share its weights.
    """
    path = record.weights or str(run.reward_model)
    whole = record.weights and not is_adapters(path)
    if whole and not has_plain_head(path, record.weights_revision):
        if trained or record.granularity != "bandit":
            raise DenserlError(
                f"the head of {path} is not a plain matrix product of each token's state",
                hint="it can reward whole responses, segmentation.granularity=bandit, and start no "
                "critic: ppo.critic_init=policy",
            )
        return SequenceReward.load(record, recipe.model, observer)
    return saved_scalar_model(
        recipe,
        path,
        revision=record.weights_revision,
        trained=trained,
        reference=reference,
        option=_OPTION if record.weights else "",
    )


def load_scorer(
    opened: RewardSetup,
    run: RunFolder,
    observer: Observer,
    *,
    reference: PreTrainedModel | None = None,
    prompts: Sequence[Prompt] = (),
) -> Scorer:
    """The run's reward model, if there is one, with the reference.

    reference: the recipe's starting model; without it, it is loaded where segments depend on it.
    prompts: those of rollouts, in the policy's ids, which the reward model reads in its own way.
    """
    recipe, chat, reward_chat_format = opened.recipe, opened.chat, opened.reward_chat_format
    if reference is None and recipe.segmentation.by_entropy:
        reference = load_reference(recipe)
    model, record = None, opened.record
    if record is not None:
        model = load_reward_model(record, recipe, run, observer=observer, reference=reference)
    if prompts and reward_chat_format is not chat:
        model = translating(model, chat, reward_chat_format, prompts, observer)
    return Scorer(
        recipe.segmentation,
        reference=reference,
        reward_model=model,
        dtype=compute_dtype(recipe.model),
        tokenizer=opened.tokenizer,
    )
