"""export: a reward model or policy as a plain Hugging Face folder with a model card."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from denserl_cli.core.chat.format import ChatFormat
from denserl_cli.core.chat.tokenizer_file import read_tokenizer
from denserl_cli.core.errors import DenserlError
from denserl_cli.core.exports.classifier import check_possible, write_classifier
from denserl_cli.core.exports.compatibility import write_config, write_tokenizer_config
from denserl_cli.core.exports.model_card import MADE_BY, Part, model_card
from denserl_cli.core.models.lora import FILES, is_adapters, merged
from denserl_cli.core.models.reward_metadata import RECORD, RewardRecord
from denserl_cli.core.observer import Observer
from denserl_cli.core.recipe.stages import STAGES, TRAINING
from denserl_cli.core.sandbox.files import with_sandbox_files
from denserl_cli.core.scoring.calibration import with_calibrated_cutoff
from denserl_cli.core.system.files import replaced_folder

if TYPE_CHECKING:
    from denserl_cli.core.recipe import Recipe
    from denserl_cli.core.runs.folder import RunFolder


def export(
    part: Part,
    recipe: Recipe,
    run: RunFolder,
    target: Path,
    *,
    replace: bool,
    as_classifier: bool = False,
) -> None:
    """Write one part of a finished run to a folder that transformers loads without denserl.

    Args:
        part: What to export.
        recipe: The recipe that made it.
        run: The run folder.
        target: Where to write.
        replace: Whether an earlier export in `target` may be replaced.
        as_classifier: Write a bandit reward model so that its last token's logit is the score.

    Raises:
        DenserlError: When the part is not trained yet, or under other settings; when `target`
            holds something else; when the reward model cannot be a classifier.
    """
    source, summary = _finished(part, recipe, run)
    record = RewardRecord.load(source) if part == "reward-model" else None
    if as_classifier:
        if record is None:
            raise DenserlError(
                "only a reward model can be a classifier", hint="add --part reward-model"
            )
        check_possible(record)
    _check_target(target, replace)
    if recipe.segmentation.cutoff == "auto":
        recipe = with_calibrated_cutoff(recipe, run, Observer(), record or _record_of(run))
    with replaced_folder(target) as folder:
        if is_adapters(source):
            whole = with_sandbox_files(recipe, run, Observer())
            merged(whole, source, scalar=record is not None).save_pretrained(folder)
        ignored = shutil.ignore_patterns(*FILES)
        shutil.copytree(source, folder, ignore=ignored, dirs_exist_ok=True)
        chat = _chat_format(recipe, folder)
        regression = {} if record is None else {"problem_type": "regression"}
        padding = {} if record is None else {"pad_token_id": chat.pad_id}
        for_both_majors = write_config(folder, **regression, **padding)
        write_tokenizer_config(folder)
        if as_classifier:
            write_classifier(folder, chat)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        card = model_card(
            part,
            recipe,
            summary,
            chat,
            record,
            architecture=config["model_type"],
            for_both_majors=for_both_majors,
            as_classifier=as_classifier,
        )
        (folder / "README.md").write_text(card, encoding="utf-8")


def _finished(part: Part, recipe: Recipe, run: RunFolder) -> tuple[Path, dict[str, Any]]:
    """Where a trained part lies, and the metrics of its training."""
    result = part.replace("-", "_")
    stage = next(name for name in TRAINING if result in STAGES[name].results)
    source = run.path / result
    run.check_settings(stage)  # the card's recipe must be the one that made the model
    summary = run.summary(stage)
    if summary is None or not source.is_dir():
        raise DenserlError(
            f"{run.path} has no finished {part.replace('-', ' ')}",
            hint=f"run: denserl {stage} --recipe {recipe.name} --out {run.path}",
        )
    return source, summary


def _check_target(target: Path, replace: bool) -> None:
    """Raise DenserlError unless the folder may be written: only an export is ever replaced."""
    if not target.is_file() and not (target.is_dir() and any(target.iterdir())):
        return
    if not _is_export(target):
        raise DenserlError(
            f"{target} holds something else than an earlier export",
            hint="name another folder with --to",
        )
    if not replace:
        raise DenserlError(
            f"{target} is not empty", hint="name another folder with --to, or pass --fresh"
        )


def _is_export(folder: Path) -> bool:
    """Whether an export made a folder, and not a training or another program."""
    try:
        return MADE_BY in (folder / "README.md").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False


def _record_of(run: RunFolder) -> RewardRecord | None:
    """What is recorded of the run's reward model, if it has one."""
    return RewardRecord.load(run.reward_model) if (run.reward_model / RECORD).exists() else None


def _chat_format(recipe: Recipe, folder: Path) -> ChatFormat:
    """How an exported model reads conversations, from the tokenizer that lies beside it."""
    return ChatFormat.of(
        read_tokenizer(str(folder)),
        terminator=recipe.chat.terminator,
        stop_tokens=recipe.chat.stop_tokens,
        template_arguments=recipe.chat.template_arguments,
    )
