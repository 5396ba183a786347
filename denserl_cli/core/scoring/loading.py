"""Loading of a run's reward model and scorer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from denserl_cli.core.engine.factory import freeze, placement, shards_frozen
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
from denserl_cli.core.scoring.measures import Scoring
from denserl_cli.core.scoring.resolve import WEIGHTS_OPTION, RewardSetup
from denserl_cli.core.scoring.scorer import ReadValues, Scorer
from denserl_cli.core.scoring.source_models import (
    NOTHING,
    SourceModels,
    by_model,
    check_reading,
    parts_measure,
    reader,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from denserl_cli.core.data.conversations import Prompt
    from denserl_cli.core.models.placement import Placement
    from denserl_cli.core.observer import Observer
    from denserl_cli.core.ppo.sources.record import Asked
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
    placement: Placement | None = None,
    observer: Observer | None = None,
    reference: PreTrainedModel | None = None,
) -> LoadedReward:
    """The run's reward model, frozen, or as the body of a critic to train.

    Args:
        record: Of the reward model.
        recipe: The recipe of the run.
        run: Where the reward model is, unless the record names published weights.
        trained: Load it to be trained.
        placement: Where its weights are put, unless it shares the reference's or rewards whole
            responses only.
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
        placement=placement,
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
    asked: Sequence[Asked] = (),
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
        asked: What sources of rewards ask for.
        packing: The recipe's `model.packing`, from callers that pack batches where the scorer says
            that its models read them.
    """
    recipe, record = setup.recipe, setup.record
    if reference is None and recipe.segmentation.by_entropy:
        reference = load_reference(recipe, placement(recipe, engine, trained=False))
    further = SourceModels(
        setup,
        run,
        observer,
        engine=engine,
        reference=reference,
        prompts=prompts,
        load=_load_reading,
    )
    reward = None
    read: ReadValues = token_values
    measures = further.measures(asked)
    if record is not None:
        wanted = by_model(asked).get("", NOTHING)
        loaded = _load_reading(
            *(setup, run, prompts, observer),
            engine=engine,
            reference=reference,
            alone=wanted.of_parts,
        )
        read = reader(loaded, wanted, record.weights or str(run.reward_model))
        alone = wanted.of_parts or isinstance(read, SequenceReader)
        reward = freeze(loaded.model, recipe, engine, alone=alone)
        check_reading(reward, wanted, record.weights or str(run.reward_model))
        scoring = Scoring(recipe.reward_model.aggregate)
        measures += parts_measure("", wanted, setup, reward, read, scoring)
    frozen = None if reference is None else freeze(reference, recipe, engine)
    models = [model for model in (frozen, reward) if model is not None]
    return Scorer(
        recipe.segmentation,
        reference=frozen,
        reward_model=reward,
        read=read,
        tokenizer=setup.tokenizer,
        measures=measures,
        packs=read is token_values and packs(models, packing, observer),
    )


def _load_reading(
    setup: RewardSetup,
    run: RunFolder,
    prompts: Sequence[Prompt],
    observer: Observer,
    *,
    engine: EngineConfig | None,
    reference: PreTrainedModel | None,
    alone: bool = False,
) -> LoadedReward:
    """The reward model of a setup's record, and how it reads responses to prompts.

    `alone`: processes call it at different times, as they do a model with another tokenizer; such
    a model is never sharded.
    """
    assert setup.record is not None
    recipe = setup.recipe
    alone = alone or (bool(prompts) and setup.reward_chat_format is not setup.chat)
    loaded = load_reward_model(
        setup.record,
        recipe,
        run,
        placement=placement(recipe, engine, trained=False, alone=alone),
        observer=observer,
        reference=None if alone and shards_frozen(recipe, engine) else reference,
    )
    return loaded._replace(read=_read_prompts(loaded, setup, prompts, observer))


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
