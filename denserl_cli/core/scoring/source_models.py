"""Loading of what sources of rewards read beyond the run's reward model and reference."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from denserl_cli.core.chat.loading import check_vocabulary
from denserl_cli.core.engine.factory import freeze, placement
from denserl_cli.core.errors import DenserlError
from denserl_cli.core.models.attention_row import refuse_hidden_attention
from denserl_cli.core.models.lora import is_adapters, load_policy
from denserl_cli.core.models.reward_metadata import RECORD, RewardRecord
from denserl_cli.core.models.scalar_head import read_more
from denserl_cli.core.models.sequence_classifier import SequenceReader, own_format, reads_ids_of
from denserl_cli.core.normalizer import LocationNormalizer
from denserl_cli.core.ppo.sources.record import OF_REWARD_MODEL, Asked
from denserl_cli.core.recipe.schema import RewardSource
from denserl_cli.core.scoring.measures import (
    Measure,
    PolicyMeasure,
    RewardMeasure,
    Scoring,
    ShapleyMeasure,
)
from denserl_cli.core.scoring.resolve import NORMALIZER, WEIGHTS_OPTION, load_normalizer

if TYPE_CHECKING:
    from denserl_cli.core.data.conversations import Prompt
    from denserl_cli.core.engine.frozen import FrozenModel
    from denserl_cli.core.observer import Observer
    from denserl_cli.core.recipe.resolved import ResolvedRecipe
    from denserl_cli.core.recipe.schema import EngineConfig
    from denserl_cli.core.runs.folder import RunFolder
    from denserl_cli.core.scoring.loading import LoadedReward
    from denserl_cli.core.scoring.resolve import RewardSetup

_IN_THE_PASS = ("prompt_value", "attention")
_AT_TOKENS = ("token_values", "prompt_value", "final_value", "attention")
_OF_PARTS = ("shapley_values", "empty_score")


class Wanted(NamedTuple):
    """What all sources together ask of one model.

    Attributes:
        first: The first of these sources, for errors.
        names: Of `ppo.sources.record.Inputs`.
        orders: Permutations of `shapley`.
    """

    first: RewardSource
    names: frozenset[str]
    orders: int

    @property
    def of_parts(self) -> bool:
        """Whether parts of responses are scored, each process at its own pace."""
        return bool(self.names & {*_OF_PARTS})

    @property
    def where(self) -> str:
        """The place in the recipe, for errors."""
        return f"ppo.rewards, {self.first.source}"


NOTHING = Wanted(RewardSource("values"), frozenset(), 0)
"""What is asked of a reward model that no source reads, as where its normaliser is fitted."""


def by_model(asked: Iterable[Asked]) -> dict[str, Wanted]:
    """What sources ask for, by the model that it is asked of (empty: the run's reward model)."""
    found: dict[str, Wanted] = {}
    for source, names in asked:
        before = found.get(source.key, Wanted(source, frozenset(), 8))
        orders = source.permutations or before.orders
        found[source.key] = Wanted(before.first, before.names | {*names}, orders)
    return found


def reader(loaded: LoadedReward, wanted: Wanted, path: str) -> Callable[..., Any]:
    """How a reward model is read for its sources, in one pass.

    Args:
        loaded: The model, and how it is read without them.
        wanted: What they ask of it.
        path: Where it came from, for errors.

    Raises:
        DenserlError: The model rewards whole responses alone.
    """
    at_tokens = [name for name in _AT_TOKENS if name in wanted.names]
    if isinstance(loaded.read, SequenceReader):
        if at_tokens:
            raise DenserlError(
                f"{wanted.where}: the reward model {path} has another tokenizer than the policy, "
                f"or a head of its own, so it has no {at_tokens[0]}",
                hint="use score or shapley, which read whole conversations",
            )
        return loaded.read
    more = [name for name in _IN_THE_PASS if name in wanted.names]
    return partial(read_more, wanted=more) if more else loaded.read


def check_reading(model: FrozenModel, wanted: Wanted, path: str) -> None:
    """Raise DenserlError where a model's attention is asked for and cannot be read."""
    if "attention" in wanted.names:
        model(refuse_hidden_attention, path)


def parts_measure(
    key: str,
    wanted: Wanted,
    setup: RewardSetup,
    model: FrozenModel,
    read: Callable[..., Any],
    scoring: Scoring,
) -> list[Measure]:
    """The measure that scores parts of responses, where a source asks for it."""
    if not wanted.of_parts:
        return []
    recipe = setup.recipe
    measure = ShapleyMeasure(
        key,
        model,
        read,
        scoring,
        orders=wanted.orders,
        seed=recipe.seed,
        batch_size=recipe.ppo.rollout.micro_batch_size,
        pad_id=setup.chat.pad_id,
    )
    return [measure]


class SourceModels:
    """Loads the models that sources name as their own."""

    def __init__(
        self,
        setup: RewardSetup,
        run: RunFolder,
        observer: Observer,
        *,
        engine: EngineConfig | None,
        reference: Any,
        prompts: Sequence[Prompt],
        load: Callable[..., LoadedReward],
    ) -> None:
        """Set up a loader.

        Args:
            setup: Of the run.
            run: Its folder.
            observer: Told when a conversation is too long.
            engine: As of `load_scorer`.
            reference: The starting model where it is loaded; adapters share its weights.
            prompts: As of `load_scorer`.
            load: Loads a reward model of a record and says how it is read.
        """
        self.setup, self.run, self.observer = setup, run, observer
        self.engine, self.reference, self.prompts = engine, reference, prompts
        self.load = load

    def measures(self, asked: Collection[Asked]) -> list[Measure]:
        """The measures of all models that sources name, each loaded once."""
        found: list[Measure] = []
        for key, wanted in by_model(asked).items():
            if key and "model_logprobs" in wanted.names:
                found.append(PolicyMeasure(key, self._policy(wanted)))
            if key and wanted.names & {*OF_REWARD_MODEL}:
                found += self._reward_model(key, wanted)
        return found

    def _policy(self, wanted: Wanted) -> FrozenModel:
        """A further policy. Raises DenserlError unless it has the policy's tokenizer."""
        path, recipe = str(wanted.first.model), self.setup.recipe
        if not is_adapters(path):
            check_vocabulary(self.setup.chat, path, wanted.first.revision, what="policy")
        model = load_policy(
            recipe,
            path,
            reference=self.reference,
            revision=wanted.first.revision,
            placement=placement(recipe, self.engine, trained=False),
        )
        record = replace(_plain_record(self.setup, wanted.first), granularity="token")
        if not reads_ids_of(record, self.setup.chat):
            raise DenserlError(
                f"{wanted.where}: the policy {path} has another tokenizer than {recipe.model.path}",
                hint="name a policy that was trained from the recipe's model",
            )
        return freeze(model, recipe, self.engine)

    def _reward_model(self, key: str, wanted: Wanted) -> list[Measure]:
        path, setup = str(wanted.first.model), self.setup
        record, whole = _record(setup, wanted.first)
        own = own_format(record, setup.chat)
        if record.granularity != "bandit" and not reads_ids_of(record, setup.chat):
            raise DenserlError(
                f"{wanted.where}: the reward model {path} has another tokenizer than "
                f"{setup.recipe.model.path}",
                hint="name one that was trained for whole responses, with score or shapley",
            )
        if (
            whole
            and "normal_values" in wanted.names
            and record.granularity != (setup.recipe.segmentation.granularity)
        ):
            raise DenserlError(
                f"{wanted.where}: {path} rewards whole responses, so it has no values of segments",
                hint="use score, differences, attention or shapley",
            )
        there = setup._replace(record=record, reward_chat_format=own or setup.chat)
        try:
            loaded = self.load(
                *(there, self.run, self.prompts, self.observer),
                engine=self.engine,
                reference=self.reference,
                alone=wanted.of_parts,
            )
        except DenserlError as error:
            hint = (error.hint or "").replace(WEIGHTS_OPTION, "ppo.rewards")
            raise DenserlError(f"{wanted.where}: {error.message}", hint=hint) from error
        read = reader(loaded, wanted, path)
        alone = wanted.of_parts or isinstance(read, SequenceReader)
        model = freeze(loaded.model, setup.recipe, self.engine, alone=alone)
        check_reading(model, wanted, path)
        scoring = Scoring(None if whole else setup.recipe.reward_model.aggregate)
        measure = RewardMeasure(key, model, read, scoring)
        return [measure, *parts_measure(key, wanted, setup, model, read, scoring)]


def _plain_record(setup: RewardSetup, source: RewardSource) -> RewardRecord:
    """What is known of a model without a record: it scores whole responses."""
    made = RewardRecord.of(setup.recipe, setup.chat)
    return replace(
        made,
        granularity="bandit",
        cutoff=None,
        weights=source.model,
        weights_revision=source.revision,
    )


def _record(setup: RewardSetup, source: RewardSource) -> tuple[RewardRecord, bool]:
    """The record of a source's own reward model, and whether it scores whole responses.

    Raises DenserlError when it was trained for other segments than the recipe's.
    """
    folder = Path(str(source.model))
    plain = _plain_record(setup, source)
    if not (folder / RECORD).is_file():
        return plain, True
    made = RewardRecord.load(folder)
    if made.weights:
        raise DenserlError(
            f"{folder} has no weights, only the name of another reward model",
            hint=f"name that one in ppo.rewards: {made.weights}",
        )
    if made.granularity == "bandit":
        return plain, True
    asked = setup.recipe.segmentation.deciding()
    wrong = [f"{k} {getattr(made, k)}" for k, v in asked.items() if getattr(made, k) != v]
    if wrong:
        raise DenserlError(
            f"ppo.rewards, {source.source}: the reward model {folder} was trained for "
            f"{', '.join(wrong)}, not for the recipe's segments",
            hint="name one that was trained for them, or for whole responses",
        )
    return replace(made, weights=source.model, weights_revision=source.revision), False


def load_normalizers(setup: RewardSetup, run: RunFolder) -> dict[str, LocationNormalizer | None]:
    """The normaliser of each reward model whose values are a source, by `RewardSource.key`.

    Raises DenserlError for one that is missing.
    """
    recipe, found = setup.recipe, dict[str, LocationNormalizer | None]()
    for source in recipe.ppo.rewards:
        if source.source != "values" or source.key in found:
            continue
        found[source.key] = (
            load_normalizer(recipe, run) if source.model is None else _beside(recipe, source)
        )
    return found


def _beside(recipe: ResolvedRecipe, source: RewardSource) -> LocationNormalizer | None:
    """The normaliser in a reward model's folder."""
    if recipe.normalizer.kind == "none":
        return None
    folder = Path(str(source.model))
    if (folder / NORMALIZER).is_file():
        return LocationNormalizer.load(folder / NORMALIZER)
    raise DenserlError(
        f"ppo.rewards, values: no {NORMALIZER} in {folder}",
        hint="fit one with denserl fit-function in its run, or set normalizer.kind=none",
    )
