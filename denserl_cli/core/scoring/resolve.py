"""Which reward model a run scores with: its own, or the published one that its recipe names.

A published model lies in a read-only cache and has no record. On first use its record and its
normaliser are written into the run folder, to the files that a trained reward model would have. So
the two are never mixed, and every later command finds the same files.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from denserl_cli.core.chat.loading import check_vocabulary, load_chat
from denserl_cli.core.errors import DenserlError
from denserl_cli.core.models.architecture import check_starting_model
from denserl_cli.core.models.device import settled_dtype, usual_dtype
from denserl_cli.core.models.lora import is_adapters
from denserl_cli.core.models.reward_metadata import RECORD, RewardRecord
from denserl_cli.core.models.sequence_classifier import (
    check_head,
    own_format,
    reads_ids_of,
)
from denserl_cli.core.normalizer import LocationNormalizer
from denserl_cli.core.recipe.resolved import as_resolved
from denserl_cli.core.recipe.stages import TRAIN_RM
from denserl_cli.core.sandbox.files import with_sandbox_files
from denserl_cli.core.scoring.calibration import with_calibrated_cutoff
from denserl_cli.core.system.distributed import (
    broadcast_object,
    main_process_first,
)
from denserl_cli.core.system.hub import readable_errors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from denserl_cli.core.chat.format import ChatFormat
    from denserl_cli.core.observer import Observer
    from denserl_cli.core.recipe.resolved import ResolvedRecipe
    from denserl_cli.core.recipe.schema import PublishedConfig, Recipe
    from denserl_cli.core.runs.folder import RunFolder

NORMALIZER = "normalizer.json"
WEIGHTS_OPTION = "published.reward_model"
"""The recipe's field that names published weights, for errors."""


class RewardSetup(NamedTuple):
    """What every command that loads models begins with.

    Attributes:
        recipe: Resolved.
        record: Of the reward model; None where none scores.
        tokenizer: Of the policy.
        chat: How the policy's conversations are written.
        reward_chat_format: How the reward model's conversations are written: `chat`, unless a
            published model has its own tokenizer.
    """

    recipe: ResolvedRecipe
    record: RewardRecord | None
    tokenizer: PreTrainedTokenizerBase
    chat: ChatFormat
    reward_chat_format: ChatFormat


def prepare(
    recipe: Recipe, run: RunFolder, observer: Observer, *, reward_model: bool
) -> RewardSetup:
    """Resolve a recipe in its run folder: the sandbox's files, the cutoff, the chat format.

    Args:
        recipe: As it was loaded.
        run: Where the sandbox's files, a calibrated cutoff and the reward model are.
        observer: Told what is made, calibrated or recorded.
        reward_model: Whether a reward model scores: the run's own, or the published one that the
            recipe names, which is recorded in the run folder on first use.

    Raises:
        DenserlError: There is no reward model, or the recipe contradicts it.
    """
    recipe = with_settled_dtype(recipe, run)
    with main_process_first():
        record = reward_record(recipe, run) if reward_model else None
        with_files = with_sandbox_files(recipe, run, observer)
        resolved = as_resolved(
            with_calibrated_cutoff(with_files, run, observer, record),
            knows_true_reward=recipe.sandbox is not None and not recipe.data.prompts,
        )
        tokenizer, chat = load_chat(resolved, observer)
        check_starting_model(resolved, observer)
        if record is None:
            return RewardSetup(resolved, None, tokenizer, chat, chat)
        reward_chat_format = own_format(record, chat) or chat
        if record.weights and not is_adapters(record.weights):
            revision = record.weights_revision
            check_vocabulary(reward_chat_format, record.weights, revision, what="reward model")
        record = record_published(record, resolved, run, chat, observer)
        return RewardSetup(resolved, record, tokenizer, chat, reward_chat_format)


def with_settled_dtype(recipe: Recipe, run: RunFolder) -> Recipe:
    """The recipe with its compute type in place of `auto`.

    A run keeps what its first command decided, on whatever machine it goes on; runs of versions
    that recorded nothing go on in the device's usual type. The embedded task always has that: it is
    too small to gain anything from bfloat16 on a CPU.
    """
    if recipe.model.dtype != "auto" or recipe.sandbox is not None:
        return recipe
    undecided = None if run.run_json.stages else settled_dtype(recipe.model)
    dtype = run.run_json.dtype or undecided or usual_dtype(recipe.model)
    run.run_json.dtype = dtype = broadcast_object(dtype)  # the first process decides for all
    return replace(recipe, model=replace(recipe.model, dtype=dtype))


def reward_record(recipe: Recipe, run: RunFolder) -> RewardRecord:
    """The record of the reward model that the run scores with; nothing is written.

    Raises DenserlError when there is none, or when the recipe contradicts it.
    """
    if (run.reward_model / RECORD).exists():
        record = RewardRecord.load(run.reward_model)
        if record.weights:
            _check_unchanged(record, recipe, run)
    elif run.interrupted(TRAIN_RM):
        raise DenserlError(
            f"the training of the reward model in {run.path} was interrupted",
            hint="finish it with denserl train-rm --resume, or name another folder with --out",
        )
    elif recipe.published is None:
        raise DenserlError(f"no reward model in {run.reward_model}", hint="run denserl train-rm")
    else:
        record = _published_record(recipe, recipe.published)
    record.check(recipe, record.weights or run.reward_model)
    return record


def record_published(
    record: RewardRecord, recipe: Recipe, run: RunFolder, chat: ChatFormat, observer: Observer
) -> RewardRecord:
    """Record a published reward model and its normaliser in the run folder on first use.

    Args:
        record: Of the reward model.
        recipe: Names the published model.
        run: Where the record is written.
        chat: Of the policy.
        observer: Told that the model is used.

    Returns:
        The record, with what stands before an answer and the terminator of the responses.

    Raises:
        DenserlError: The model cannot be loaded, it was trained on responses that begin or end in
            another way, or it has another tokenizer but should reward parts of a response.
    """
    record.check_format(chat, record.weights or run.reward_model)
    if (run.reward_model / RECORD).exists():
        return record
    published = recipe.published
    assert published is not None
    if not is_adapters(published.reward_model):
        check_head(published.reward_model, published.revision)
    if record.granularity != "bandit" and not reads_ids_of(record, chat):
        raise DenserlError(
            f"the reward model {record.weights} has another tokenizer than {recipe.model.path}, so "
            f"it cannot reward the {record.granularity}s of its responses",
            hint="use it for whole responses: segmentation.granularity and published.granularity "
            "bandit",
        )
    normalizer = _published_normalizer(recipe, published)
    record = replace(
        record, terminator_id=chat.terminator_id, answer_beginning=chat.answer.beginning
    )
    what = f"using the published reward model {published.reward_model}"
    with run.locked(observer):
        run.claim()
        if normalizer is not None:
            normalizer[0].save(run.normalizer, normalizer[1])
            what += " and its published normaliser"
        record.save(run.reward_model)  # last: its presence says that both files are complete
    observer.notice(f"{what}; recorded in {run.reward_model}")
    return record


def _published_record(recipe: Recipe, published: PublishedConfig) -> RewardRecord:
    """The record of the recipe's published model: that in its folder, where denserl trained it."""
    file = _published_file(published, RECORD)
    if file is None:
        return RewardRecord.published(recipe)
    made = RewardRecord.load(file.parent)
    if made.weights:
        raise DenserlError(
            f"{published.reward_model} has no weights, only the name of another reward model",
            hint=f"name that one: --set {WEIGHTS_OPTION}={made.weights}",
        )
    _check_made_for(published, {"granularity": made.granularity, "cutoff": made.cutoff}, file)
    return replace(made, weights=published.reward_model, weights_revision=published.revision)


def _published_normalizer(
    recipe: Recipe, published: PublishedConfig
) -> tuple[LocationNormalizer, dict[str, Any]] | None:
    """The normaliser that goes with the published model, and its record."""
    source = {"source": f"published with {published.reward_model}"}
    if published.normalizer is not None:
        kind = "global" if published.granularity == "bandit" else "location"
        floor = recipe.normalizer.min_std
        made = LocationNormalizer(**asdict(published.normalizer), min_std=floor)
        return made, {"kind": kind, **recipe.segmentation.deciding(), **source}
    file = _published_file(published, NORMALIZER)
    if file is None:
        return None
    normalizer = LocationNormalizer.load(file)
    record = json.loads(file.read_text(encoding="utf-8")).get("record", {})
    _check_made_for(published, record, file)
    return normalizer, {**record, **source}


def _published_file(published: PublishedConfig, name: str) -> Path | None:
    """A file that lies beside the published weights, if there is one."""
    from transformers import AutoConfig
    from transformers.utils import cached_file

    path, revision = published.reward_model, published.revision
    with readable_errors(path, "reward model", WEIGHTS_OPTION):
        found = cached_file(
            path, name, revision=revision, _raise_exceptions_for_missing_entries=False
        )
        if found is None:  # an error for a model that does not exist, before it is recorded
            AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False)
    return None if found is None else Path(found)


def _check_made_for(published: PublishedConfig, made: dict[str, Any], file: Path) -> None:
    """Raise DenserlError when the recipe contradicts the files beside a published reward model."""
    wrong = [
        f"published.{name} is {getattr(published, name)}, {file} says {made.get(name)}"
        for name in ("granularity", "cutoff")
        if made.get(name) != getattr(published, name)
    ]
    if wrong:
        raise DenserlError("; ".join(wrong), hint="change the recipe to what the file says")


def _check_unchanged(record: RewardRecord, recipe: Recipe, run: RunFolder) -> None:
    """Raise DenserlError when the recipe's published model is not the one that the run recorded."""
    published = recipe.published
    hint = f"name another folder with --out, or remove {run.reward_model}"
    named = (published.reward_model, published.revision) if published else (None, None)
    if named != (record.weights, record.weights_revision):
        names = [" at ".join(filter(None, name)) or "none" for name in
                 ((record.weights, record.weights_revision), named)]  # fmt: skip
        raise DenserlError(
            f"{run.path} uses the reward model {names[0]}, the recipe names {names[1]}", hint=hint
        )
    assert published is not None
    if published.normalizer is None or not run.normalizer.exists():
        return
    recorded = LocationNormalizer.load(run.normalizer)
    about = json.loads(run.normalizer.read_text(encoding="utf-8")).get("record", {})
    now = LocationNormalizer(**asdict(published.normalizer), min_std=recorded.min_std)
    if about.get("source") == f"published with {record.weights}" and now != recorded:
        raise DenserlError(
            f"{run.normalizer} has other coefficients than the recipe's published.normalizer",
            hint=hint,
        )


def load_normalizer(recipe: Recipe, run: RunFolder) -> LocationNormalizer | None:
    """The normaliser that PPO uses; None for kind none.

    Raises DenserlError when it is missing, or was fitted for other settings than the recipe's.
    """
    if recipe.normalizer.kind == "none":
        return None
    if not run.normalizer.exists():
        raise DenserlError(
            f"no normalizer in {run.path}",
            hint=f"run: denserl fit-function --recipe {recipe.name} --out {run.path}",
        )
    normalizer = LocationNormalizer.load(run.normalizer)
    record = json.loads(run.normalizer.read_text(encoding="utf-8")).get("record", {})
    asked = {
        "kind": recipe.normalizer.kind,
        **recipe.segmentation.deciding(),
    }
    record.setdefault("cut", "entropy")  # published and imported ones do not record it
    wrong = [f"{k} {record.get(k)} instead of {v}" for k, v in asked.items() if record.get(k) != v]
    floor = recipe.normalizer.min_std
    if floor is not None and floor != normalizer.min_std:
        wrong.append(f"min_std {normalizer.min_std} instead of {floor}")
    if wrong:
        raise DenserlError(
            f"{run.normalizer} was fitted for {', '.join(wrong)}",
            hint="run denserl fit-function with this recipe and --fresh",
        )
    return normalizer
