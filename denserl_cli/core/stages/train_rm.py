"""The stage train-rm: from preference pairs or labelled steps to a reward model's folder."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from denserl_cli.core.data.arrow_rows import StepRows
from denserl_cli.core.data.batches import global_batches
from denserl_cli.core.data.loading import load_pairs
from denserl_cli.core.engine.factory import check_engine
from denserl_cli.core.engine.random_state import seed_everything
from denserl_cli.core.models.architecture import check_scalar_class
from denserl_cli.core.models.reward_metadata import RewardRecord
from denserl_cli.core.models.saving import save_model
from denserl_cli.core.planning.workload import count_steps
from denserl_cli.core.recipe.stages import TRAIN_RM
from denserl_cli.core.reward_model.step_segments import step_segments_notice
from denserl_cli.core.reward_model.step_trainer import StepTrainer
from denserl_cli.core.reward_model.trainer import RewardTrainer
from denserl_cli.core.reward_model.training import ScalarTrainer
from denserl_cli.core.scoring.resolve import prepare
from denserl_cli.core.system.distributed import barrier, is_main_process
from denserl_cli.core.system.files import replaced_folder

if TYPE_CHECKING:
    from denserl_cli.core.observer import Observer
    from denserl_cli.core.recipe.schema import Recipe
    from denserl_cli.core.runs.folder import Mode, RunFolder


def train_reward_model(recipe: Recipe, run: RunFolder, mode: Mode, observer: Observer) -> None:
    """Train the reward model of a recipe and save it in the run folder."""
    check_engine(recipe, recipe.reward_model.engine, "reward_model.engine")
    setup = prepare(recipe, run, observer, reward_model=False)
    resolved, tokenizer, chat = setup.recipe, setup.tokenizer, setup.chat
    check_scalar_class(resolved.model)
    data = load_pairs(resolved, chat, observer)
    batches = global_batches(
        len(data.train),
        resolved.reward_model.batch_size,
        steps=count_steps(TRAIN_RM, resolved, len(data.train)).total,
        seed=resolved.seed,
    )
    seed_everything(resolved.seed)
    trainer_class: type[ScalarTrainer[Any]] = RewardTrainer
    if isinstance(data.train, StepRows):
        trainer_class = StepTrainer
        if said := step_segments_notice(data.train, resolved.segmentation, tokenizer):
            observer.notice(said)
    trainer: ScalarTrainer[Any] = trainer_class(
        resolved,
        run,
        observer,
        rows=data.train,
        evaluation=data.evaluation,
        batches=batches,
        tokenizer=tokenizer,
        pad_id=chat.pad_id,
    )
    trainer.train(trainer.session.start(mode, data.skipped))
    weights, model = trainer.engine.weights(), trainer.engine.model
    if weights is not None:
        model.config.pad_token_id = chat.pad_id
        with replaced_folder(run.reward_model) as folder:
            save_model(model, weights, folder)
            tokenizer.save_pretrained(folder)
            # the model as the user named it, the cutoff as a number
            RewardRecord.of(replace(resolved, model=recipe.model), chat).save(folder)
    barrier()
    if not is_main_process():
        return
    summary = trainer.summary()
    run.finished(TRAIN_RM, summary)
    observer.table("reward model", ["metric", "value"], [[k, v] for k, v in summary.items()])
