"""What each phase of a stage holds at its peak, on one GPU."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

from denserl_cli.core.planning import host_memory
from denserl_cli.core.planning import memory_terms as memory
from denserl_cli.core.planning.memory_terms import Bytes, Setting, added
from denserl_cli.core.planning.model_shape import ModelShape
from denserl_cli.core.recipe.schema import Recipe
from denserl_cli.core.recipe.stages import FIT_FUNCTION, TRAIN_PPO, TRAIN_RM, StageName
from denserl_cli.core.sampling.limits import PLANNED_ROWS, PROMPT_TOKENS

QUANTIZED = 0.516
"""Bytes of a weight in 4 bits, with its share of the doubly quantised scales."""


class Plan(NamedTuple):
    """A stage under one setting: the terms of each phase, and the CPUs' memory, in bytes."""

    stage: StageName
    setting: Setting
    phases: dict[str, Bytes]
    cpu: float

    @property
    def peak(self) -> float:
        """Bytes on one GPU in the phase that needs most."""
        return max(memory.total(terms) for terms in self.phases.values())


def plan(recipe: Recipe, shape: ModelShape, stage: StageName, setting: Setting) -> Plan:
    """What a stage of the recipe needs under a setting."""
    needs = {TRAIN_RM: _train_rm, FIT_FUNCTION: _fit, TRAIN_PPO: _train_ppo}[stage]
    phases, cpu = needs(recipe, shape, setting)
    if not setting.on_cpu:
        allowance = {"CUDA allowance": float(memory.CUDA_ALLOWANCE)}
        phases = {name: added(terms, allowance) for name, terms in phases.items()}
    return Plan(stage, setting, phases, cpu)


@dataclass(frozen=True)
class _Trained:
    """A model in training: all its weights, those that are trained, those of its widest matrix."""

    weights: int
    trained: int
    widest: int

    def state(self, setting: Setting) -> Bytes:
        """What it always holds on the GPU."""
        buffer = memory.offload_buffer(self.widest, setting)
        return added(memory.training_state(self.trained, setting), buffer)

    def loading(self, before: Bytes, setting: Setting, *, lora: bool) -> Bytes:
        """While it arrives beside what there is; adapters are drawn over what is there already."""
        return before if lora else memory.loading(before, self.weights, self.widest, setting)

    def offloaded(self, setting: Setting) -> float:
        """What its offloading takes of the CPUs' memory."""
        return host_memory.offloaded(self.trained, setting, widest=self.widest)

    def update(
        self, shape: ModelShape, setting: Setting, activations: Bytes, *, lora: bool
    ) -> Bytes:
        """What its own update adds: the most of a pass, the reduction after it and the step.

        A large model's buckets are full, and reduced, while there still are activations; those of
        CPU processes, which are small, at the end.
        """
        buffer = memory.bucket(self.trained, setting)
        reduction = added(buffer, memory.reduction(self.trained, setting))
        held = self.held_bucket(setting)
        passing = added(
            self.in_a_pass(shape, setting, lora=lora),
            {} if lora else memory.widest_gradient(shape, setting),
            activations,
            held if setting.on_cpu else reduction,
        )
        step = added(held, memory.step_copies(self.trained, setting))
        most = max(passing, reduction, step, key=memory.total)
        return added(memory.gradients(self.trained, setting), most)

    def in_a_pass(self, shape: ModelShape, setting: Setting, *, lora: bool) -> Bytes:
        """What a pass needs beside the weights; of adapters, autocast copies no more than them."""
        working = self.trained if lora and setting.zero_stage < 3 else self.weights
        embedding = 0 if lora else shape.embedding
        return memory.pass_weights(working, setting, embedding=embedding)

    def held_bucket(self, setting: Setting) -> Bytes:
        """The bucket that stage 3 never gives back."""
        return memory.bucket(self.trained, setting) if setting.zero_stage == 3 else {}

    def waiting(self, setting: Setting) -> Bytes:
        """While the other model of PPO has its turn, its gradients wait for the step."""
        return added(memory.gradients(self.trained, setting), self.held_bucket(setting))


def _scalar(recipe: Recipe, shape: ModelShape) -> _Trained:
    """A reward model or critic: the body and a scalar head, or adapters and that head."""
    weights = shape.body + shape.hidden
    adapters = shape.adapters(recipe.lora) if recipe.lora else 0
    trained = adapters + shape.hidden if recipe.lora else weights
    return _Trained(weights + adapters, trained, min(trained, shape.embedding))


def _policy(recipe: Recipe, shape: ModelShape) -> _Trained:
    adapters = shape.adapters(recipe.lora) if recipe.lora else 0
    trained = adapters if recipe.lora else shape.parameters
    return _Trained(shape.parameters + adapters, trained, min(trained, shape.embedding))


def _base(recipe: Recipe, shape: ModelShape, setting: Setting) -> Bytes:
    """The starting model: the reference and, with LoRA, what every adapter lies on."""
    if recipe.lora is None:
        return memory.frozen_weights(shape.parameters, setting)
    layers = shape.layers * sum(one * other for _, one, other in shape.linears)
    weights: float = shape.parameters
    if recipe.lora.quantize:
        weights += layers * (QUANTIZED / setting.compute - 1)
    return memory.frozen_weights(weights, replace(setting, shard_frozen=setting.zero_stage == 3))


def _reference_pass(
    shape: ModelShape, setting: Setting, rows: int, length: int, tokens: int
) -> Bytes:
    return added(
        memory.gathered_frozen(shape.parameters, setting),
        memory.inference_activations(shape, rows, length, setting),
        memory.likelihood(shape, tokens, setting),
    )


def _train_rm(
    recipe: Recipe, shape: ModelShape, setting: Setting
) -> tuple[dict[str, Bytes], float]:
    settings, length, lora = recipe.reward_model, recipe.data.max_length, recipe.lora is not None
    rows = 2 * settings.micro_batch_size
    model = _scalar(recipe, shape)
    segmented = recipe.segmentation.by_entropy
    base = _base(recipe, shape, setting) if segmented or lora else {}
    held = added(base, model.state(setting))
    phases = {"load": model.loading(base, setting, lora=lora)}
    if segmented:
        scoring = _reference_pass(shape, setting, rows, length, rows * length)
        phases["segment"] = added(held, model.waiting(setting), scoring)
    phases["update"] = added(
        held,
        model.update(
            shape,
            setting,
            memory.training_activations(shape, rows, length, setting, lora=lora),
            lora=lora,
        ),
    )
    return phases, max(model.offloaded(setting), host_memory.reading(shape.embedding, setting))


def _fit(recipe: Recipe, shape: ModelShape, setting: Setting) -> tuple[dict[str, Bytes], float]:
    rows, length = 2 * recipe.normalizer.batch_size, recipe.data.max_length
    segmented = recipe.segmentation.by_entropy
    lora = recipe.lora is not None and recipe.published is None
    base = _base(recipe, shape, setting) if segmented or lora else {}
    if not lora:
        base = added(base, memory.frozen_weights(shape.body, setting))
    scoring = memory.inference_activations(shape, rows, length, setting)
    if segmented:
        scoring = _reference_pass(shape, setting, rows, length, rows * length)
    else:
        scoring = added(scoring, memory.gathered_frozen(shape.body, setting))
    return {"score": added(base, scoring)}, host_memory.reading(shape.embedding, setting)


def _train_ppo(
    recipe: Recipe, shape: ModelShape, setting: Setting
) -> tuple[dict[str, Bytes], float]:
    ppo, lora = recipe.ppo, recipe.lora is not None
    length = ppo.max_prompt_length + ppo.rollout.max_new_tokens
    policy = _policy(recipe, shape)
    critics = [_scalar(recipe, shape)] if ppo.has_critic else []  # the one critic, if any
    base = _base(recipe, shape, setting)
    if ppo.uses_reward_model and (not lora or recipe.published is not None):
        base = added(base, memory.frozen_weights(shape.body, setting))
    further = {one.key: one.source for one in ppo.rewards if one.key}
    for source in further.values():  # taken to be as large as the policy
        weights = shape.parameters if source == "log_ratio" else shape.body
        base = added(base, memory.frozen_weights(weights, setting))
    responses = math.ceil(ppo.rollout.batch_size * ppo.rollout.samples_per_prompt / setting.ranks)
    waiting, returned, offloaded = memory.frozen_models(base, setting)
    models = (policy, *critics)
    *earlier, last = models
    held = added(waiting, *(model.state(setting) for model in models))
    held_in_rollout = added(held, *(model.held_bucket(setting) for model in models))
    sampled, record = (
        ppo.rollout.micro_batch_size,
        memory.rollout_record(responses, ppo.rollout.max_new_tokens),
    )
    rows = ppo.micro_batch_size
    activations = memory.training_activations(shape, rows, length, setting, lora=lora)
    likelihood = memory.likelihood(
        shape, rows * ppo.rollout.max_new_tokens, setting, trained=True, head=not lora
    )
    phases = {
        "load": last.loading(
            added(waiting, *(model.state(setting) for model in earlier)), setting, lora=lora
        ),
        "rollout": added(held_in_rollout, _sampling(recipe, shape, setting, policy)),
        "score": added(
            held_in_rollout, returned, record, _scoring(recipe, shape, setting, policy, sampled)
        ),
    }
    for critic in critics:
        phases["critic"] = added(
            held,
            record,
            policy.waiting(setting),
            critic.update(shape, setting, activations, lora=lora),
        )
    phases["policy"] = added(
        held,
        record,
        *(critic.waiting(setting) for critic in critics),
        policy.update(shape, setting, added(activations, likelihood), lora=lora),
    )
    # the last model is read while the frozen models and the others' offloaded state are there
    reading = max(last.offloaded(setting), host_memory.reading(shape.embedding, setting))
    return phases, offloaded + sum(model.offloaded(setting) for model in earlier) + reading


def _sampling(recipe: Recipe, shape: ModelShape, setting: Setting, policy: _Trained) -> Bytes:
    """Generation: the whole policy gathered once, the cache, and a pass over prompts beside it."""
    ppo, rows = recipe.ppo, recipe.ppo.rollout.rows or PLANNED_ROWS
    read = max(1, min(rows, PROMPT_TOKENS["cuda"] // ppo.max_prompt_length))
    whole = replace(setting, live=policy.weights, prefetch=0)
    gathered = policy.in_a_pass(shape, whole, lora=recipe.lora is not None)
    trained = recipe.lora is None
    length = ppo.max_prompt_length + ppo.rollout.max_new_tokens
    prompts = added(
        memory.kv_cache(shape, read, ppo.max_prompt_length, setting),
        memory.inference_activations(shape, read, ppo.max_prompt_length, setting, trained=trained),
    )
    wider = max(prompts, memory.drawing(shape, rows), key=memory.total)
    return added(gathered, memory.kv_cache(shape, rows, length, setting), wider)


def _scoring(
    recipe: Recipe, shape: ModelShape, setting: Setting, policy: _Trained, rows: int
) -> Bytes:
    """The pass of the policy or of the reference, whichever needs more; the others need less."""
    ppo = recipe.ppo
    length, tokens = (
        ppo.max_prompt_length + ppo.rollout.max_new_tokens,
        rows * ppo.rollout.max_new_tokens,
    )
    reference = _reference_pass(shape, setting, rows, length, tokens)
    sampled = added(
        policy.in_a_pass(shape, setting, lora=recipe.lora is not None),
        memory.inference_activations(shape, rows, length, setting, trained=recipe.lora is None),
        memory.likelihood(shape, tokens, setting),
    )
    return max(reference, sampled, key=memory.total)
