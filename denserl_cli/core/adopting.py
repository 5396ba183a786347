"""Which reward model a run scores with: its own, or the published one that its recipe names.

A published model lies in a read-only cache and has no record. On first use one is written into the
run folder, with the published normaliser beside it, where a model of the run's own would have
them: so the two are never mixed, and every later command finds them in the same place.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from denserl_cli.core.errors import DenserlError
from denserl_cli.core.normalizer import LocationNormalizer
from denserl_cli.core.reward_model import RECORD, RewardRecord, load_scalar_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from denserl_cli.core.chat import ChatFormat
    from denserl_cli.core.recipe.schema import Recipe
    from denserl_cli.core.run import RunFolder
    from denserl_cli.core.tracking import Observer


def reward_record(recipe: Recipe, run: RunFolder) -> RewardRecord:
    """The record of the reward model that the run scores with; nothing is written.

    Raises DenserlError when there is none, or when the recipe contradicts it.
    """
    published = recipe.published
    if (run.reward_model / RECORD).exists():
        record = RewardRecord.load(run.reward_model)
        if record.weights and published and record.weights != published.reward_model:
            raise DenserlError(
                f"{run.path} uses the reward model {record.weights}, the recipe names "
                f"{published.reward_model}",
                hint="name another folder with --out",
            )
    elif run.interrupted("train-rm"):
        raise DenserlError(
            f"the training of the reward model in {run.path} was interrupted",
            hint="finish it with denserl train-rm --resume, or name another folder with --out",
        )
    elif published is None:
        raise DenserlError(f"no reward model in {run.reward_model}", hint="run denserl train-rm")
    else:
        record = RewardRecord.published(recipe)
    record.check(recipe, run.reward_model)
    return record


def adopt(
    record: RewardRecord, recipe: Recipe, run: RunFolder, chat: ChatFormat, observer: Observer
) -> RewardRecord:
    """Write down a published reward model and its normaliser in the run folder on first use.

    Raises DenserlError when responses end with another token than the model was trained on.
    """
    if (run.reward_model / RECORD).exists():
        record.check_terminator(chat, run.reward_model)
        return record
    published = recipe.published
    assert published is not None
    record = replace(record, terminator_id=chat.terminator_id)
    run.claim()
    record.save(run.reward_model)
    what = f"using the published reward model {published.reward_model}"
    if published.normalizer is not None:
        LocationNormalizer(**asdict(published.normalizer)).save(
            run.normalizer,
            {
                "kind": "global" if published.granularity == "bandit" else "location",
                "granularity": published.granularity,
                "cutoff": published.cutoff,
                "source": f"published with {published.reward_model}",
            },
        )
        what += " and its published normaliser"
    observer.notice(f"{what}; recorded in {run.reward_model}")
    return record


def load_reward_model(
    record: RewardRecord, recipe: Recipe, run: RunFolder, *, trained: bool = False
) -> PreTrainedModel:
    """The run's reward model, frozen, or as the body of a critic to train."""
    return load_scalar_model(
        recipe.model,
        path=record.weights or str(run.reward_model),
        revision=record.weights_revision,
        fresh_head=False,
        trained=trained,
    )
