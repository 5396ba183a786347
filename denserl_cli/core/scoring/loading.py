"""Loading of a run's reward model and scorer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from denserl_cli.core.engine.factory import freeze
from denserl_cli.core.errors import DenserlError
from denserl_cli.core.models.lora import is_adapters, load_reference, saved_scalar_model
from denserl_cli.core.models.packing_support import packs
from denserl_cli.core.models.reward_metadata import RewardRecord
from denserl_cli.core.models.scalar_head import token_values
from denserl_cli.core.models.sequence_classifier import (
    SequenceReader,
    Translation,
    has_plain_head,
    load_classifier,
    positions,
)
from denserl_cli.core.scoring.resolve import WEIGHTS_OPTION, RewardSetup
from denserl_cli.core.scoring.scorer import ReadValues, Scorer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from denserl_cli.core.data.conversations import Prompt
    from denserl_cli.core.observer import Observer
    from denserl_cli.core.recipe.schema import EngineConfig, Recipe
    from denserl_cli.core.runs.folder import RunFolder


class LoadedReward(NamedTuple):
    """A reward model, and how its value at each token is read."""

    model: PreTrainedModel
    read: ReadValues


def load_reward_model(
    record: RewardRecord,
    recipe: Recipe,
    run: RunFolder,
    *,
    trained: bool = False,
    observer: Observer | None = None,
    reference: PreTrainedModel | None = None,
) -> LoadedReward:
    """The run's reward model, frozen, or as the body of a critic to train.

    Args:
        record: Of the reward model.
        recipe: The recipe of the run.
        run: Where the reward model is, unless the record names published weights.
        trained: Load it to be trained.
        observer: Told when a conversation is longer than the model's positions.
        reference: The recipe's starting model where it is loaded already; adapters share its
            weights.

    Raises:
        DenserlError: The model cannot be loaded, or its head does not allow what the recipe asks
            for.
    """
    path = record.weights or str(run.reward_model)
    whole = record.weights and not is_adapters(path)
    if whole and not has_plain_head(path, record.weights_revision):
        if trained or record.granularity != "bandit":
            raise DenserlError(
                f"the head of {path} is not a plain matrix product of each token's state",
                hint="it can only reward whole responses, and no critic starts from it: set "
                "segmentation.granularity=bandit and ppo.critic_init=policy",
            )
        model = load_classifier(record, recipe.model)
        limit = positions(model)
        return LoadedReward(model, SequenceReader(plain_head=False, limit=limit, observer=observer))
    model = saved_scalar_model(
        recipe,
        path,
        revision=record.weights_revision,
        trained=trained,
        reference=reference,
        option=WEIGHTS_OPTION if record.weights else "",
    )
    return LoadedReward(model, token_values)


def load_scorer(
    setup: RewardSetup,
    run: RunFolder,
    observer: Observer,
    *,
    engine: EngineConfig | None = None,
    reference: PreTrainedModel | None = None,
    prompts: Sequence[Prompt] = (),
    packing: bool | None = False,
) -> Scorer:
    """The scorer of a run: the reference and, if there is one, the reward model.

    Args:
        setup: The resolved recipe, the reward model's record and both chat formats.
        run: The run's folder.
        observer: Told when a conversation is longer than the reward model's positions.
        engine: Of the stage, says where frozen models are held; None keeps them whole.
        reference: The recipe's starting model where it is loaded already; otherwise it is loaded if
            segments depend on it.
        prompts: Those of rollouts, in the policy's ids; the reward model reads them in its own
            format.
        packing: The recipe's `model.packing`, from callers that pack batches where the scorer says
            that its models read them.
    """
    recipe, record = setup.recipe, setup.record
    if reference is None and recipe.segmentation.by_entropy:
        reference = load_reference(recipe)
    reward = None
    read: ReadValues = token_values
    if record is not None:
        loaded = load_reward_model(record, recipe, run, observer=observer, reference=reference)
        read = _read_prompts(loaded, setup, prompts, observer)
        alone = isinstance(read, SequenceReader)
        reward = freeze(loaded.model, recipe, engine, alone=alone)
    frozen = None if reference is None else freeze(reference, recipe, engine)
    models = [model for model in (frozen, reward) if model is not None]
    return Scorer(
        recipe.segmentation,
        reference=frozen,
        reward_model=reward,
        read=read,
        tokenizer=setup.tokenizer,
        packs=read is token_values and packs(models, packing, observer),
    )


def _read_prompts(
    loaded: LoadedReward, setup: RewardSetup, prompts: Sequence[Prompt], observer: Observer
) -> ReadValues:
    """How the reward model reads responses to prompts that are encoded in the policy's ids."""
    if not prompts or setup.reward_chat_format is setup.chat:
        return loaded.read
    rewrite = Translation(setup.chat, setup.reward_chat_format, prompts)
    if isinstance(loaded.read, SequenceReader):
        loaded.read.rewrite = rewrite
        return loaded.read
    limit = positions(loaded.model)
    return SequenceReader(plain_head=True, rewrite=rewrite, limit=limit, observer=observer)
