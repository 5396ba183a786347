"""The stage train-ppo: load what the recipe names, train the policy, save it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING, Any

from denserl_cli.core.chat.format import ChatFormat
from denserl_cli.core.data.batches import global_batches
from denserl_cli.core.data.conversations import Prompt
from denserl_cli.core.data.loading import load_prompts
from denserl_cli.core.engine.base import Engine
from denserl_cli.core.engine.factory import check_engine, make_engine, placement
from denserl_cli.core.engine.random_state import seed_everything
from denserl_cli.core.models.lora import load_reference, new_policy, new_scalar_model
from denserl_cli.core.models.saving import save_model
from denserl_cli.core.planning.workload import count_steps
from denserl_cli.core.ppo.evaluator import Evaluator
from denserl_cli.core.ppo.prompts import PromptPlan, evaluation_batch
from denserl_cli.core.ppo.reward_functions import RewardFunctions, reward_settings
from denserl_cli.core.ppo.rewards import RewardSources
from denserl_cli.core.ppo.rollout import Collector
from denserl_cli.core.ppo.trainer import HEADLINE, PPOTrainer
from denserl_cli.core.ppo.update import Updater
from denserl_cli.core.recipe.stages import TRAIN_PPO
from denserl_cli.core.runs.stage_session import StageSession
from denserl_cli.core.sampling.sampler import make_sampler, sampling_of, takes_sampled_logprobs
from denserl_cli.core.sandbox.task import true_reward_of
from denserl_cli.core.scoring.loading import load_reward_model, load_scorer
from denserl_cli.core.scoring.resolve import RewardSetup, load_normalizer, prepare
from denserl_cli.core.system.distributed import barrier, is_main_process
from denserl_cli.core.system.files import replaced_folder

if TYPE_CHECKING:
    from denserl_cli.core.observer import Observer
    from denserl_cli.core.recipe.schema import Recipe
    from denserl_cli.core.runs.folder import Mode, RunFolder


def train_policy(recipe: Recipe, run: RunFolder, mode: Mode, observer: Observer) -> None:
    """Train the policy of a recipe and save it in the run folder."""
    check_engine(recipe, recipe.ppo.engine, "ppo.engine")
    setup = prepare(recipe, run, observer, reward_model=recipe.ppo.learned_weight != 0)
    resolved, tokenizer = setup.recipe, setup.tokenizer
    normalizer = None if setup.record is None else load_normalizer(resolved, run)
    functions = RewardFunctions(resolved, tokenizer)
    sources = RewardSources(reward_settings(resolved), normalizer, functions)
    prompts = load_prompts(resolved, setup.chat, observer)
    plan = _plan(resolved, prompts.train)
    seed_everything(resolved.seed)
    collector, updater = _models(setup, run, observer, plan, prompts.everything)
    _stop_generation(updater.actor.model, setup.chat)
    session = StageSession(
        TRAIN_PPO,
        run,
        observer,
        engines={"actor": updater.actor, "critic": updater.critic},
        unit="iteration",
        total=plan.iterations,
        save_every=resolved.ppo.save_every,
        headline=HEADLINE,
    )
    evaluator = Evaluator(
        resolved,
        collector=collector,
        sources=sources,
        prompts=evaluation_batch(prompts.evaluation, resolved.seed, resolved.ppo.eval_samples),
        tokenizer=tokenizer,
        true_reward=true_reward_of(resolved),
    )
    trainer = PPOTrainer(
        resolved.ppo,
        session,
        plan=plan,
        collector=collector,
        sources=sources,
        updater=updater,
        evaluator=evaluator,
        save_policy=partial(_save, updater.actor, tokenizer, run),
    )
    with closing(collector.sampler):
        trainer.train(session.start(mode, prompts.skipped))
    trainer.save_policy("policy")
    if not is_main_process():
        return
    summary = trainer.summary()
    run.finished(TRAIN_PPO, summary)
    rows = [[k, v["start"], v["end"]] for k, v in summary.items() if isinstance(v, dict)]
    observer.table("policy", ["metric", "start", "end"], rows)


def _plan(recipe: Recipe, prompts: Sequence[Prompt]) -> PromptPlan:
    """The prompts of every iteration."""
    ppo, steps = recipe.ppo, count_steps(TRAIN_PPO, recipe, len(prompts))
    batches = global_batches(
        len(prompts), ppo.rollout.batch_size, steps=steps.batches, seed=recipe.seed
    )
    return PromptPlan(prompts, batches, samples=ppo.rollout.samples_per_prompt, seed=recipe.seed)


def _models(
    setup: RewardSetup,
    run: RunFolder,
    observer: Observer,
    plan: PromptPlan,
    prompts: Sequence[Prompt],
) -> tuple[Collector, Updater]:
    """A collector with policy, critic and scorer, and an updater of policy and critic."""
    recipe, record, chat = setup.recipe, setup.record, setup.chat
    ppo, steps = recipe.ppo, count_steps(TRAIN_PPO, recipe, len(plan.prompts))
    reference = load_reference(recipe, placement(recipe, ppo.engine, trained=False))
    # the frozen models first: they are sharded or offloaded before the trained ones need memory
    scorer = load_scorer(
        setup, run, observer, engine=ppo.engine, reference=reference, prompts=prompts
    )
    trained = placement(recipe, ppo.engine, trained=True)
    policy = new_policy(recipe, reference, trained)
    values = (
        load_reward_model(
            record, recipe, run, trained=True, placement=trained, reference=reference
        ).model
        if record is not None and ppo.critic_init == "reward_model"
        else new_scalar_model(recipe, reference, trained)
    )
    actor = make_engine(
        recipe,
        ppo.engine,
        policy,
        learning_rate=ppo.actor_learning_rate,
        total_steps=max(1, (steps.batches - ppo.critic_warmup) * steps.per_batch),
    )
    critic = make_engine(
        recipe,
        ppo.engine,
        values,
        learning_rate=ppo.critic_learning_rate,
        total_steps=steps.total,
    )
    rollout = ppo.rollout
    sampler = make_sampler(
        recipe,
        actor,
        pad_id=chat.pad_id,
        max_length=ppo.max_prompt_length + rollout.max_new_tokens,
    )
    collector = Collector(
        sampler=sampler,
        policy=actor,
        critic=critic,
        scorer=scorer,
        sampling=sampling_of(rollout, chat.stop_ids),
        micro_batch_size=rollout.micro_batch_size,
        pad_id=chat.pad_id,
        sampled_logprobs=takes_sampled_logprobs(ppo, sampler),
    )
    updater = Updater(ppo, actor=actor, critic=critic, pad_id=chat.pad_id, seed=recipe.seed)
    return collector, updater


def _stop_generation(policy: Any, chat: ChatFormat) -> None:
    """Make the policy's `generate` end at the stop ids; drop settings that cannot be saved."""
    from transformers import GenerationConfig

    stops, old = list(chat.stop_ids), policy.generation_config
    old.eos_token_id = stops
    try:
        old.validate(strict=True)
    except ValueError:  # such as a temperature without do_sample
        policy.generation_config = GenerationConfig(
            bos_token_id=old.bos_token_id, eos_token_id=stops, pad_token_id=chat.pad_id
        )


def _save(actor: Engine, tokenizer: Any, run: RunFolder, name: str) -> None:
    weights = actor.weights()
    if weights is not None:
        with replaced_folder(run.path / name) as folder:
            save_model(actor.model, weights, folder)
            tokenizer.save_pretrained(folder)
    barrier()
