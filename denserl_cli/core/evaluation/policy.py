"""evaluate policy: what a policy earns on held-out prompts, beside the one it started from."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from io import BytesIO
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import torch

from denserl_cli.core.data.loading import at_most, load_prompts
from denserl_cli.core.data.skipped import list_skipped
from denserl_cli.core.engine.frozen import LocalModel
from denserl_cli.core.errors import DenserlError
from denserl_cli.core.evaluation.statistics import (
    best_of,
    best_of_kl,
    equivalent_n,
    paired_difference,
)
from denserl_cli.core.models.device import compute_dtype
from denserl_cli.core.models.lora import load_policy, load_reference
from denserl_cli.core.ppo.metrics import response_metrics
from denserl_cli.core.ppo.prompts import PromptBatch, evaluation_batch
from denserl_cli.core.ppo.reward_sources import RewardSources
from denserl_cli.core.ppo.rollout import Collector
from denserl_cli.core.recipe.stages import EVALUATE_POLICY
from denserl_cli.core.reward_model.metrics import Floats
from denserl_cli.core.runs.policies import choose_policy
from denserl_cli.core.sampling.sampler import check_sampler, make_sampler, sampling_of
from denserl_cli.core.sandbox.task import true_reward_of
from denserl_cli.core.scoring.loading import load_scorer
from denserl_cli.core.scoring.resolve import prepare
from denserl_cli.core.scoring.scorer import check_finite
from denserl_cli.core.scoring.source_models import load_normalizers
from denserl_cli.core.system.distributed import is_main_process
from denserl_cli.core.system.files import replaced_file, write_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from denserl_cli.core.chat.format import ChatFormat
    from denserl_cli.core.data.arrow_rows import PromptRows
    from denserl_cli.core.data.conversations import Prompt
    from denserl_cli.core.normalizer import LocationNormalizer
    from denserl_cli.core.observer import Observer
    from denserl_cli.core.ppo.rollout import Rollout
    from denserl_cli.core.recipe.schema import Recipe
    from denserl_cli.core.runs.folder import RunFolder
    from denserl_cli.core.sampling.sampler import Sampler
    from denserl_cli.core.sandbox.task import TrueReward
    from denserl_cli.core.scoring.resolve import RewardSetup
    from denserl_cli.core.scoring.scorer import Scorer

RESPONSES = 256
"""Responses that are sampled and scored before they are written."""
Metrics = dict[str, Floats]
"""Each metric of every response: (prompts, samples)."""


def evaluate_policy(
    recipe: Recipe,
    run: RunFolder,
    observer: Observer,
    *,
    policy: str | None = None,
    samples: int = 8,
    limit: int | None = None,
    held_out: bool = True,
) -> dict[str, Any]:
    """Compare a policy with the one it started from; the run folder gets metrics and samples.

    Args:
        recipe: as written.
        run: whose reward model scores the responses.
        observer: told of the progress.
        policy: hub name, folder or `start` (`choose_policy`).
        samples: responses of either policy to each prompt.
        limit: at most so many prompts.
        held_out: use the prompts that train-ppo holds out, otherwise all of `data.prompts`.

    Returns:
        The metrics, as they are written.
    """
    check_sampler(recipe)
    chosen = choose_policy(recipe, run, policy)
    if chosen.notice:
        observer.notice(chosen.notice)
    setup = prepare(recipe, run, observer, reward_model=recipe.ppo.uses_reward_model)
    recipe, record = setup.recipe, setup.record
    path = chosen.path or recipe.model.path
    prompts = _prompts(recipe, run, setup.chat, observer, limit, held_out)
    observer.notice(f"comparing the policy {path} with {recipe.model.path}")
    start = load_reference(recipe)
    sources = RewardSources(recipe, setup.tokenizer, _normalizers(setup, run, observer))
    scorer = load_scorer(
        setup, run, observer, reference=start, prompts=prompts, asked=sources.asked
    )
    evaluator = PolicyEvaluator(
        setup,
        scorer=scorer,
        sources=sources,
        true_reward=true_reward_of(setup.recipe),
        observer=observer,
    )
    file = run.evaluation_file(EVALUATE_POLICY)
    batch = evaluation_batch(prompts, recipe.seed, samples)
    trained = start if chosen.path is None else _load(path, recipe, start)
    with (
        replaced_file(file.with_name("policy-samples.jsonl"))
        if is_main_process()
        else BytesIO() as out
    ):
        before = evaluator.evaluate("start", start, batch, samples, out)
        after = before
        if trained is not start:
            after = evaluator.evaluate("policy", trained, batch, samples, out)
    result = {
        "recipe": recipe.name,
        "policy": path,
        "start_policy": recipe.model.path,
        "reward_model": None if record is None else record.weights or str(run.reward_model),
        "rewards": [asdict(one) for one in recipe.ppo.rewards],
        "prompts": len(prompts),
        "samples_per_prompt": samples,
        "seed": recipe.seed,
        **compare(before, after),
    }
    if is_main_process():
        write_text(file, json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    observer.notice(f"written to {file}, samples beside it")
    return result


def _load(path: str, recipe: Recipe, start: PreTrainedModel) -> PreTrainedModel:
    """A frozen policy; DenserlError when its vocabulary is not that of the starting model."""
    policy = load_policy(recipe, path, reference=start)
    rows, expected = (m.get_output_embeddings().weight.shape[0] for m in (policy, start))
    if rows != expected:
        raise DenserlError(
            f"the policy {path} has a vocabulary of {rows}, the starting model "
            f"{recipe.model.path} one of {expected}",
            hint="name a policy that was trained from the recipe's model",
        )
    return policy


class PolicyEvaluator:
    """Samples from policies and scores their responses."""

    def __init__(
        self,
        setup: RewardSetup,
        *,
        scorer: Scorer,
        sources: RewardSources,
        true_reward: TrueReward | None,
        observer: Observer,
    ) -> None:
        self.recipe, self.tokenizer, self.chat = setup.recipe, setup.tokenizer, setup.chat
        self.scorer, self.true_reward, self.observer = scorer, true_reward, observer
        self.sources = sources

    def evaluate(
        self, name: str, policy: Any, batch: PromptBatch, samples: int, out: BinaryIO
    ) -> Metrics:
        """The metrics of `samples` responses for each prompt, which are written to `out`."""
        ppo, held = self.recipe.ppo, LocalModel(policy, compute_dtype(self.recipe.model))
        sampler = make_sampler(
            self.recipe,
            held,
            pad_id=self.chat.pad_id,
            max_length=ppo.max_prompt_length + ppo.rollout.max_new_tokens,
        )
        with closing(sampler):
            return self._evaluate(name, sampler, held, batch, samples, out)

    def _evaluate(
        self,
        name: str,
        sampler: Sampler,
        policy: LocalModel,
        batch: PromptBatch,
        samples: int,
        out: BinaryIO,
    ) -> Metrics:
        collector = Collector(
            sampler=sampler,
            policy=policy,
            scorer=self.scorer,
            sampling=sampling_of(self.recipe.ppo.rollout, self.chat.stop_ids),
            micro_batch_size=self.recipe.ppo.rollout.micro_batch_size,
            pad_id=self.chat.pad_id,
            sampled_logprobs=sampler.exact and self.recipe.ppo.rollout.top_p == 1,
        )
        collector.refresh()
        found: list[Metrics] = []
        self.observer.begin(f"sample responses of the {name}", total=len(batch.prompts))
        for part in _parts(batch):
            rollout = collector.collect(part.ids, part.keys, self.observer.advance)
            ids = [response.tolist() for response in rollout.responses]
            texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
            found.append(self._metrics(part.prompts, rollout, texts))
            self._write(out, name, part, texts, found[-1])
        self.observer.end()
        return {
            metric: np.concatenate([one[metric] for one in found]).reshape(-1, samples)
            for metric in found[0]
        }

    def _metrics(
        self, prompts: Sequence[Prompt], rollout: Rollout, texts: Sequence[str]
    ) -> Metrics:
        """Every metric of each response of a rollout, (R,) each."""
        tensors = response_metrics(rollout, self.recipe.reward_model.aggregate)
        given = self.sources(prompts, rollout)
        rewards = given.totals
        if self.sources.complete:
            rewards = {"dense_reward": given.tokens.sum(1), **rewards}
        if rollout.token_values is not None:
            rewards = {"rm_score": tensors.pop("rm_score"), **rewards}
        tensors = {**rewards, **tensors}
        numbers = torch.stack(list(tensors.values())).double().cpu().numpy()
        metrics = dict(zip(tensors, numbers, strict=True))
        scores = metrics.get("rm_score", np.zeros(len(prompts)))
        for prompt, score, kl in zip(prompts, scores, metrics["kl"], strict=True):
            check_finite(score + kl, f"a response to {prompt.origin}")
        if self.true_reward is not None:
            asked = [prompt.messages[-1]["content"] for prompt in prompts]
            true = [self.true_reward(*pair) for pair in zip(asked, texts, strict=True)]
            metrics["true_reward"] = np.array(true)
        return metrics

    def _write(
        self, out: BinaryIO, name: str, batch: PromptBatch, texts: Sequence[str], metrics: Metrics
    ) -> None:
        for row, (prompt, text) in enumerate(zip(batch.prompts, texts, strict=True)):
            line = {
                "model": name,
                "origin": prompt.origin,
                "sample": batch.keys[row][-1],
                "messages": [*prompt.messages, {"role": "assistant", "content": text}],
                **{metric: float(values[row]) for metric, values in metrics.items()},
            }
            out.write((json.dumps(line, ensure_ascii=False) + "\n").encode())


def compare(before: Metrics, after: Metrics) -> dict[str, Any]:
    """Means of both policies, their paired differences, and best-of-n of the one before.

    before, after: the metrics of the starting and of the evaluated policy on the same prompts. The
    best are those of the highest rm_score, or dense_reward where there is no reward model.
    """
    by = "rm_score" if "rm_score" in before else "dense_reward"
    scores, samples = before[by], before[by].shape[1]
    curve = [best_of(k, scores) for k in range(1, samples + 1)]
    shown = [k for k in range(1, samples + 1) if k & (k - 1) == 0 or k == samples]
    true = before.get("true_reward")
    best = [
        {"n": k, by: curve[k - 1], "kl_bound": best_of_kl(k)}
        | ({} if true is None else {"true_reward": best_of(k, scores, true)})
        for k in shown
    ]
    return {
        "start": {name: float(values.mean()) for name, values in before.items()},
        "trained": {name: float(values.mean()) for name, values in after.items()},
        "difference": {
            name: asdict(paired_difference(after[name].mean(1), before[name].mean(1)))
            for name in after
        },
        "best_of_n": best,
        "equivalent_n": equivalent_n(curve, float(after[by].mean())),
    }


def _normalizers(
    setup: RewardSetup, run: RunFolder, observer: Observer
) -> dict[str, LocationNormalizer | None] | None:
    """The sources' normalisers; None where the run's is not fitted yet."""
    recipe = setup.recipe
    needed = recipe.ppo.uses_normalizer and recipe.normalizer.kind != "none"
    if needed and not run.normalizer.exists():
        observer.notice(f"no normaliser in {run.path}: no dense reward; denserl fit-function fits")
        return None
    return load_normalizers(setup, run)


def _prompts(
    recipe: Recipe,
    run: RunFolder,
    chat: ChatFormat,
    observer: Observer,
    limit: int | None,
    held_out: bool,
) -> PromptRows:
    if not held_out:
        sources = at_most(limit, recipe.data.prompts)
        recipe = replace(recipe, data=replace(recipe.data, prompts=sources, eval_prompts=0))
    found = load_prompts(recipe, chat, observer)
    list_skipped(found.skipped, run.skipped_file(EVALUATE_POLICY), observer)
    prompts = found.evaluation if held_out else found.train
    if not prompts:
        raise DenserlError(
            f"recipe {recipe.name} holds out no prompts to evaluate on",
            hint="pass --data PATH_OR_HUB_NAME, or raise data.eval_prompts",
        )
    return prompts[:limit]


def _parts(batch: PromptBatch) -> Iterator[PromptBatch]:
    for start in range(0, len(batch.prompts), RESPONSES):
        part = slice(start, start + RESPONSES)
        yield PromptBatch(batch.prompts[part], batch.keys[part])
