"""Values and combinations of a well-typed recipe that make no sense."""

from __future__ import annotations

import os
from collections.abc import Iterator
from glob import glob

from denserl_cli.core.recipe.advantage_checks import advantage_problems
from denserl_cli.core.recipe.fields import value_of
from denserl_cli.core.recipe.mapping_checks import (
    Problem,
    mapping_problems,
    ranking_problems,
)
from denserl_cli.core.recipe.reward_checks import reward_problems
from denserl_cli.core.recipe.schema import (
    CRITIC_WORDS,
    CUT_FIELDS,
    PublishedConfig,
    Recipe,
    Source,
)


def _keys(block: str, names: str) -> tuple[str, ...]:
    return tuple(f"{block}.{name}" for name in names.split())


_POSITIVE = (
    *_keys("sandbox", "phrases phrase_length endings response_phrases pairs label_temperature"),
    *_keys("sandbox", "hidden_size heads layers fit_steps"),
    *_keys("data", "max_length max_prompt_length"),
    *_keys("optimizer", "clip_norm"),
    *_keys("reward_model", "epochs batch_size micro_batch_size learning_rate temperature"),
    *_keys("reward_model", "eval_every save_every"),
    *_keys("normalizer", "pairs batch_size min_std"),
    *_keys("ppo", "passes iterations train_batch_size micro_batch_size epochs max_prompt_length"),
    *_keys("ppo.rollout", "rows batch_size samples_per_prompt micro_batch_size max_new_tokens"),
    *_keys("ppo.rollout", "temperature top_p memory_share importance_cap"),
    *_keys("ppo", "actor_learning_rate critic_learning_rate policy_clip value_clip reward_clip"),
    *_keys("ppo", "policy_clip_high dual_clip lam_alpha critic_warmup_rollouts"),
    *_keys("ppo", "max_response_tokens kl_target kl_horizon kl_limit"),
    *_keys("ppo", "eval_samples eval_every save_every softmin_temperature"),
    *_keys("run", "keep_checkpoints keep_gigabytes"),
    *_keys("segmentation", "segment_length"),
    *_keys("lora", "rank alpha"),
    *_keys("published.normalizer", "b_std"),
    *_keys("recorded", "gpus parameters hidden_size intermediate_size layers heads"),
    *_keys("recorded", "key_value_heads vocabulary preference_pairs prompts"),
)
_ZERO_OR_MORE = (
    "seed",
    *_keys("segmentation", "cutoff cut_seed"),
    *_keys("published", "cutoff"),
    *_keys("data", "eval_pairs eval_prompts"),
    *_keys("optimizer", "weight_decay"),
    *_keys("reward_model", "target_margin label_smoothing center_rewards"),
    *_keys("normalizer", "seed"),
    *_keys("ppo", "kl_coef critic_warmup entropy_coef"),
    *_keys("run", "log_samples"),
)
_AT_MOST_ONE = (
    *_keys("optimizer", "warmup_ratio min_lr_ratio"),
    *_keys("ppo", "gamma lam lam_value rollout.top_p rollout.memory_share"),
)
_WORDS = ("auto", "adaptive", "none")
"""Words in place of a number."""
_LOCAL_STARTS = ("/", "./", "../", "~")
_LOCAL_ENDS = tuple(
    f"{kind}{packed}"
    for kind in (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
    for packed in ("", ".gz", ".zst", ".bz2")
)


def problems(recipe: Recipe) -> Iterator[Problem]:
    """Yield every value, combination and local path of the recipe that makes no sense.

    Runs on a recipe whose optional choices are already filled in (see `defaults.resolved`).
    """
    yield from _ranges(recipe)
    yield from _source_ranges(recipe)
    yield from _method(recipe)
    yield from reward_problems(recipe)
    yield from advantage_problems(recipe)
    yield from _batches(recipe)
    yield from _engines(recipe)
    yield from _rollout(recipe)
    yield from _origins(recipe)
    yield from _missing_files(recipe)


def _ranges(recipe: Recipe) -> Iterator[Problem]:
    for key in _POSITIVE:
        value = value_of(recipe, key)
        if value not in (None, *_WORDS) and not value > 0:
            yield Problem(key, f"must be positive, not {value}")
    for key in _ZERO_OR_MORE:
        value = value_of(recipe, key)
        if value not in (None, *_WORDS) and not value >= 0:
            yield Problem(key, f"must be zero or more, not {value}")
    for key in _AT_MOST_ONE:
        value = value_of(recipe, key)
        if value in (None, *_WORDS):
            continue
        if value > 1 or (value < 0 and key not in _POSITIVE):
            yield Problem(key, f"must be between 0 and 1, not {value}")
    for place, beta in enumerate(recipe.optimizer.betas):
        if not 0 <= beta < 1:
            yield Problem(
                f"optimizer.betas[{place}]", f"must be at least 0 and below 1, not {beta}"
            )
    for key in ("seed", "normalizer.seed"):
        if value_of(recipe, key) >= 2**32:
            yield Problem(key, f"must be below {2**32}, not {value_of(recipe, key)}")
    if recipe.sandbox is not None and recipe.sandbox.endings > 1:
        for name in ("phrases", "phrase_length"):
            if getattr(recipe.sandbox, name) < 2:
                advice = "must be 2 or more where a phrase has several endings"
                yield Problem(f"sandbox.{name}", advice, ("sandbox.endings",))
    hidden = value_of(recipe, "sandbox.hidden_size")
    if hidden is not None and hidden % 16:
        yield Problem("sandbox.hidden_size", f"must be a multiple of 16, not {hidden}")
    heads = value_of(recipe, "sandbox.heads")
    if heads is not None and heads > 0 and hidden % (2 * heads):
        advice = f"{hidden} cannot be split into {heads} heads of an even size"
        yield Problem("sandbox.heads", advice, ("sandbox.hidden_size",))
    if not recipe.name or recipe.name.startswith(".") or set(recipe.name) & set("/\\"):
        yield Problem("name", f"{recipe.name!r} cannot name a run folder; use a plain name")


def _sources(recipe: Recipe) -> Iterator[tuple[str, Source]]:
    for name in ("preferences", "evaluation", "prompts"):
        for place, source in enumerate(getattr(recipe.data, name)):
            yield f"data.{name}[{place}]", source


def _source_ranges(recipe: Recipe) -> Iterator[Problem]:
    for key, source in _sources(recipe):
        if not source.path:
            yield Problem(f"{key}.path", "is empty; name a hub data set or a path")
        if not source.weight > 0:
            yield Problem(f"{key}.weight", f"must be positive, not {source.weight}")
        if source.max_samples is not None and not source.max_samples > 0:
            yield Problem(f"{key}.max_samples", f"must be positive, not {source.max_samples}")
        if "://" in source.path:
            advice = "addresses are not read here; download it and name the file, or a hub name"
            yield Problem(f"{key}.path", f"{source.path}: {advice}")
        yield from mapping_problems(key, source)
    ranked = {key: source for key, source in _sources(recipe) if "prompts" not in key}
    yield from ranking_problems(recipe.reward_model, ranked)


def _method(recipe: Recipe) -> Iterator[Problem]:
    """Choices of the method that contradict each other (method §2, §4, §5)."""
    granularity, given = recipe.segmentation.granularity, ("segmentation.granularity",)
    yield from _cuts(recipe)
    if recipe.published is not None:
        yield from _published(recipe.published, recipe.segmentation.cut)
    if granularity == "bandit" and recipe.normalizer.kind == "location":
        yield Problem(
            "normalizer.kind", "bandit has one segment, so no location; use global", given
        )
    if granularity == "bandit" and recipe.ppo.interpolation != "end":
        advice = "bandit pays its one score on the last token; use end"
        yield Problem("ppo.interpolation", advice, given)
    limit, penalty = recipe.ppo.max_response_tokens, recipe.ppo.overlong_penalty
    if (limit is None) != (penalty is None):
        names = ["ppo.max_response_tokens", "ppo.overlong_penalty"]
        absent, present = names if limit is None else reversed(names)
        yield Problem(absent, f"belongs together with {present}; set both or neither", (present,))
    if recipe.ppo.kl_target is not None and recipe.ppo.kl_coef == 0:
        advice = "an adaptive coefficient cannot grow from 0; start it above"
        yield Problem("ppo.kl_coef", advice, ("ppo.kl_target",))


def _cuts(recipe: Recipe) -> Iterator[Problem]:
    """Where segments end: each cut has fields of its own (method §2)."""
    settings, block = recipe.segmentation, "segmentation"
    granularity, cut, cutoff = settings.granularity, settings.cut, settings.cutoff
    given, by_cut = (f"{block}.granularity",), (f"{block}.cut", f"{block}.granularity")
    if granularity != "segment":
        if cutoff is not None:
            yield Problem(f"{block}.cutoff", f"{granularity} has no cutoff; set it to null", given)
        if cut != "entropy":
            advice = f"{granularity} is not cut in another way; leave it at entropy"
            yield Problem(f"{block}.cut", advice, given)
            return
    elif cut == "entropy" and cutoff is None:
        advice = "`denserl segment --calibrate LENGTH` proposes one for your model and data"
        yield Problem(f"{block}.cutoff", f"segment needs a cutoff; {advice}", by_cut)
    for name in ("cutoff", "quantile", "segment_length", "cut_seed"):
        if getattr(settings, name) is not None and name not in CUT_FIELDS[cut]:
            owners = " and ".join(owner for owner in CUT_FIELDS if name in CUT_FIELDS[owner])
            advice = f"belongs to cut {owners}, not to {cut}; set it to null"
            yield Problem(f"{block}.{name}", advice, by_cut)
    quantile, length = settings.quantile, settings.segment_length or 1.0
    if cut == "quantile" and quantile is None:
        yield Problem(f"{block}.quantile", "cut quantile needs one, such as 0.85", by_cut)
    if quantile is not None and not 0 < quantile < 1:
        yield Problem(f"{block}.quantile", f"must be above 0 and below 1, not {quantile}")
    if cut in ("fixed", "random") and 0 < length < 1:
        yield Problem(f"{block}.segment_length", f"a segment cannot have {length} tokens", by_cut)
    if cut == "fixed" and length >= 1 and length != int(length):
        yield Problem(f"{block}.segment_length", f"fixed needs whole tokens, not {length}", by_cut)


def _published(published: PublishedConfig, cut: str) -> Iterator[Problem]:
    """A published pair must be whole in itself; whether the recipe can use it is seen later."""
    granularity, normalizer = published.granularity, published.normalizer
    given = ("published.granularity", "segmentation.cut")
    if (granularity == "segment" and cut == "entropy") != (published.cutoff is not None):
        advice = "segment cut by entropy has one, nothing else has; null for `published` drops it"
        yield Problem("published.cutoff", advice, given)
    if granularity == "bandit" and normalizer and (normalizer.w_mean or normalizer.w_std):
        advice = "bandit has one location; leave w_mean and w_std at 0"
        yield Problem("published.normalizer", advice, given)


def _batches(recipe: Recipe) -> Iterator[Problem]:
    """Lengths and batch sizes that do not fit into each other."""
    data, rm, ppo = recipe.data, recipe.reward_model, recipe.ppo
    if data.max_prompt_length >= data.max_length:
        yield Problem(
            "data.max_prompt_length",
            f"{data.max_prompt_length} leaves no room for a response within data.max_length "
            f"{data.max_length}; set it to less, such as {data.max_length // 2}",
            ("data.max_length",),
        )
    responses = ppo.rollout.batch_size * ppo.rollout.samples_per_prompt
    if ppo.train_batch_size > 0 and responses % ppo.train_batch_size:
        yield Problem(
            "ppo.train_batch_size",
            f"{ppo.train_batch_size} does not divide the {responses} responses of an iteration",
            ("ppo.rollout.batch_size", "ppo.rollout.samples_per_prompt"),
        )
    for block, key, batch, micro in (
        ("reward_model", "batch_size", rm.batch_size, rm.micro_batch_size),
        ("ppo", "train_batch_size", ppo.train_batch_size, ppo.micro_batch_size),
    ):
        if micro > 0 and batch % micro:
            yield Problem(
                f"{block}.{key}",
                f"{batch} is not a multiple of {block}.micro_batch_size {micro}",
                (f"{block}.micro_batch_size",),
            )


def _engines(recipe: Recipe) -> Iterator[Problem]:
    """What the engines of the stages cannot do."""
    for block in ("reward_model", "ppo"):
        key, engine = f"{block}.engine", value_of(recipe, f"{block}.engine")
        if engine.offload_parameters and engine.zero_stage != 3:
            advice = f"needs sharded weights; set {key}.zero_stage to 3"
            yield Problem(f"{key}.offload_parameters", advice, (f"{key}.zero_stage",))
        if block == "reward_model" and engine.offload_frozen:
            advice = "train-rm asks the reference in every step; it is for ppo.engine"
            yield Problem(f"{key}.offload_frozen", advice)
        for name in ("shard_frozen", "offload_frozen"):
            if recipe.lora is not None and getattr(engine, name):
                advice = "adapters share the frozen weights, which must stay where they are"
                yield Problem(f"{key}.{name}", advice, ("lora",))
        own = engine.deepspeed.get("zero_optimization")
        if isinstance(own, dict) and "stage" in own:
            yield Problem(f"{key}.deepspeed", f"the stage is {key}.zero_stage's affair")


def _rollout(recipe: Recipe) -> Iterator[Problem]:
    """A server needs an engine that asks it."""
    rollout, key = recipe.ppo.rollout, "ppo.rollout.server"
    if rollout.server is None:
        return
    if rollout.engine != "vllm":
        yield Problem(key, "is for engine vllm; set it to null", ("ppo.rollout.engine",))
    if not rollout.server.startswith(("http://", "https://")):
        yield Problem(key, f"{rollout.server!r} is no address such as http://localhost:8000")


def _origins(recipe: Recipe) -> Iterator[Problem]:
    """Without a sandbox, which fills in what a recipe leaves open, a model must be named."""
    if recipe.sandbox is None and not recipe.model.path:
        yield Problem("model.path", "missing; name a hub model or a folder", ("sandbox",))


def _missing_files(recipe: Recipe) -> Iterator[Problem]:
    named = [(f"{key}.path", source.path) for key, source in _sources(recipe)]
    for key in ("model.path", "model.tokenizer", "published.reward_model", "published.policy"):
        named.append((key, value_of(recipe, key) or ""))
    if recipe.ppo.critic_init not in CRITIC_WORDS:
        named.append(("ppo.critic_init", recipe.ppo.critic_init))
    rewards = enumerate(recipe.ppo.rewards)
    named += [(f"ppo.rewards[{place}].model", one.model or "") for place, one in rewards]
    for key, path in named:
        home = os.path.expanduser(path)
        if "://" in path or not looks_local(path) or os.path.exists(home):
            continue
        if not (key.startswith("data.") and glob(home, recursive=True)):
            yield Problem(key, f"no such file or folder: {path}")


def looks_local(path: str) -> bool:
    """Whether the text can only be a path: a hub name has one slash and no data file's ending."""
    several = any(mark in path for mark in "*?[")
    known = path.startswith(_LOCAL_STARTS) or path.endswith(_LOCAL_ENDS)
    return known or several or path.count("/") > 1
