"""Findings from the metrics of train-ppo.

The constants are the thresholds. "Early" and "late" are means over the first and the last fifth of
the iterations.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from denserl_cli.core.recipe.stages import TRAIN_PPO
from denserl_cli.core.reporting.finding import POINTS, Check, Finding
from denserl_cli.core.reporting.locations import pool
from denserl_cli.core.reporting.record import RunRecord, Series, is_number

RISE = 0.5
"""Late minus early reward, in stds over the iterations, above which it counts as a rise."""
GROWTH = 1.5
"""Late over early length, or number of segments, above which it has grown too much (method §8)."""
SHRINKAGE = 0.5
"""Late over early length below which responses have become too short."""
HIGH_KL = 100.0
"""Nats a response beyond which a reward model is rarely right (Gao et al. 2022)."""
HIGH_KL_PER_TOKEN = 0.5
LOW_KL = 0.1
"""Nats a response below which the policy has hardly moved."""
TARGET_RANGE = (0.5, 2.0)
"""Per-token KL over ppo.kl_target within which the adaptive controller has reached its target."""
ENTROPY_LEFT = 0.25
"""Late over early entropy below which the policy writes nearly the same each time."""
ENTROPY_GROWTH = 2.0
CLIPPED = (0.1, 0.5)
"""Shares of clipped token rewards: many, and most."""
FLOORED = (0.01, 0.1)
"""Shares of segments at the normaliser's floor: some, and many."""
OFF_CENTRE = 1.0
"""Mean normalised reward of the first rollouts, in stds, beyond which the fit suits other text."""
SPREAD_RANGE = (0.5, 2.0)
"""Std of the normalised rewards of the first rollouts within which the fit suits them."""
UNTERMINATED = 0.5
FALL = 1 / 3
"""Share of the gain in true reward that is lost again."""
POLICY_CLIPPED = 0.3
"""Share of tokens whose probability ratio is outside the clip range."""


def true_reward_lost(record: RunRecord) -> Iterator[Finding]:
    """A reward that rises while the true reward falls, or a true reward that was better before."""
    true = record.series(TRAIN_PPO, "true_reward")
    if len(true.values) < 2 * POINTS:
        return
    width = max(1, len(true.values) // 5)
    smooth = np.convolve(true.values, np.ones(width) / width, "valid")
    best, at = float(smooth.max()), int(true.steps[int(smooth.argmax()) + width // 2])
    gained = best - true.early
    if true.early - true.late > true.values.std() and _rises(_reward(record)):
        yield Finding(
            "serious",
            f"The reward rises and the true reward falls, from {true.early:.3g} to "
            f"{true.late:.3g}: the policy exploits the reward model.",
            "raise ppo.kl_coef, and train the reward model better before PPO.",
        )
    elif gained > 0 and best - true.late > FALL * gained:
        yield Finding(
            "warning",
            f"The true reward was best around iteration {at} ({best:.3g}) and fell back to "
            f"{true.late:.3g}.",
            "stop there (ppo.iterations), raise ppo.kl_coef, or take policy_best.",
        )


def length_drift(record: RunRecord) -> Iterator[Finding]:
    """Responses that grow or shrink while the policy learns."""
    length = record.series(TRAIN_PPO, "response_length")
    if len(length.values) < POINTS:
        return
    change = f"from {length.early:.0f} to {length.late:.0f} tokens"
    if length.late > GROWTH * length.early:
        rises = _rises(_reward(record))
        yield Finding(
            "serious" if rises else "warning",
            f"The reward rises while the length explodes: responses went {change}."
            if rises
            else f"Responses grew {change}, and the reward did not rise with them.",
            "raise ppo.kl_coef, set ppo.max_response_tokens with ppo.overlong_penalty, try "
            "ppo.segment_total=mean, and look at the reward model's accuracy by length difference.",
        )
    elif length.late < SHRINKAGE * length.early:
        yield Finding(
            "warning",
            f"Responses were cut {change}.",
            "a reward model may prefer short text, or a few good words pay better than many: "
            "raise ppo.kl_coef; with bandit rewards try segment or token ones.",
        )


def segments_drift(record: RunRecord) -> Iterator[Finding]:
    """A number of segments that grows, which their summed rewards may pay for (method §8)."""
    segments = record.series(TRAIN_PPO, "segments_per_response")
    if len(segments.values) < POINTS or segments.late <= GROWTH * segments.early:
        return
    summed = record.setting("ppo.segment_total") == "sum"
    yield Finding(
        "serious" if summed else "warning",
        f"Segments per response went from {segments.early:.1f} to {segments.late:.1f}"
        + (
            ": their rewards are summed, so the policy may be paid for text that surprises the "
            "reference."
            if summed
            else "."
        ),
        ("try ppo.segment_total=mean, or " if summed else "try ") + "a higher ppo.kl_coef.",
    )


def kl_range(record: RunRecord) -> Iterator[Finding]:
    """A KL that is too high, too low, or below zero."""
    kl, per_token = record.series(TRAIN_PPO, "kl"), record.series(TRAIN_PPO, "kl_per_token")
    if len(kl.values) < POINTS:
        return
    each = f", {per_token.late:.2g} a token" if per_token else ""
    said = f"The KL to the reference is {kl.late:.3g} nats a response{each}"
    if kl.late < -LOW_KL:
        yield Finding(
            "serious",
            f"{said}: below zero, so the samples are not drawn from the distribution that is "
            "trained.",
            "set ppo.rollout.top_p=1, and see whether both models load the same weights.",
        )
    elif kl.late > HIGH_KL or (per_token and per_token.late > HIGH_KL_PER_TOKEN):
        yield Finding(
            "serious",
            f"{said}: so far from the text that it was trained on, the reward model is rarely "
            "right.",
            "raise ppo.kl_coef, set ppo.kl_target or ppo.kl_limit, lower "
            "ppo.actor_learning_rate, or take an earlier policy: policy_best.",
        )
    elif kl.late < LOW_KL:
        yield Finding(
            "warning",
            f"{said}: the policy has hardly moved.",
            "raise ppo.actor_learning_rate, lower ppo.kl_coef, or train longer.",
        )
    yield from _kl_limits(record, kl, per_token)


def _kl_limits(record: RunRecord, kl: Series, per_token: Series) -> Iterator[Finding]:
    limit, target = record.setting("ppo.kl_limit"), record.setting("ppo.kl_target")
    if is_number(limit) and kl.values[-1] > limit:
        yield Finding(
            "warning",
            f"Training ended at iteration {kl.steps[-1]:.0f}, where the KL of {kl.values[-1]:.3g} "
            f"nats passed ppo.kl_limit ({limit:g}).",
            "raise ppo.kl_coef or set ppo.kl_target, so that the policy stays within the limit.",
        )
    if is_number(target) and per_token:
        low, high = (factor * target for factor in TARGET_RANGE)
        if not low <= per_token.late <= high:
            yield Finding(
                "warning",
                f"The KL is {per_token.late:.3g} nats a token, and ppo.kl_target asks for "
                f"{target:g}: the controller has not caught up.",
                "lower ppo.kl_horizon, or start with another ppo.kl_coef.",
            )


def entropy_change(record: RunRecord) -> Iterator[Finding]:
    """An entropy that collapses or explodes."""
    entropy = record.series(TRAIN_PPO, "entropy")
    if len(entropy.values) < POINTS or entropy.early <= 0:
        return
    change = f"from {entropy.early:.3g} to {entropy.late:.3g} nats a token"
    if entropy.late < ENTROPY_LEFT * entropy.early:
        yield Finding(
            "warning",
            f"The policy's entropy collapsed {change}: it writes nearly the same each time and "
            "explores no more.",
            "raise ppo.kl_coef, lower ppo.actor_learning_rate, or fewer ppo.epochs; where one "
            "answer is best, as in a task with one right phrase, this is what learning looks like.",
        )
    elif entropy.late > ENTROPY_GROWTH * entropy.early:
        yield Finding(
            "warning",
            f"The policy's entropy rose {change}: its text becomes random.",
            "raise ppo.kl_coef or lower ppo.actor_learning_rate, and read the samples; with "
            "ppo.segment_total=sum, surprising text may pay.",
        )


def clipped_rewards(record: RunRecord) -> Iterator[Finding]:
    """Rewards that are clipped, so that good and better ones are equal."""
    clipped = record.series(TRAIN_PPO, "clipped_rewards")
    if not clipped or clipped.late <= CLIPPED[0]:
        return
    clip = record.setting("ppo.reward_clip")
    most = clipped.late > CLIPPED[1]
    yield Finding(
        "serious" if most else "warning",
        f"{'Most' if most else 'Many'} rewards are clipped: {clipped.late:.0%} of the "
        f"token rewards are at ± {clip if is_number(clip) else 'ppo.reward_clip'}, so good and "
        "better are rewarded alike.",
        "fit the normaliser (normalizer.kind) on this reward model, raise ppo.reward_clip, or use "
        "ppo.interpolation=even.",
    )


def normalizer_floor(record: RunRecord) -> Iterator[Finding]:
    """Segments where the fitted std is below its floor (method §4)."""
    floored = record.series(TRAIN_PPO, "floored_segments")
    if not floored or floored.late <= FLOORED[0]:
        return
    yield Finding(
        "warning" if floored.late > FLOORED[1] else "note",
        f"{floored.late:.1%} of the segments lie where the normaliser's std is at its floor "
        "(early in long responses): their rewards are not what was fitted.",
        "fit on longer responses or more pairs (normalizer.pairs), set normalizer.min_std, or use "
        "normalizer.kind=global.",
    )


def normalizer_fit(record: RunRecord) -> Iterator[Finding]:
    """A normaliser that was fitted to other responses than the policy's."""
    lines = record.metrics.get(TRAIN_PPO, ())
    pooled = pool(lines[: max(1, len(lines) // 5)], "reward")
    if pooled is None or record.setting("normalizer.kind") in ("none", "last"):
        return  # neither kind is fitted to all segments
    mean, std = pooled.whole
    if abs(mean) > OFF_CENTRE or not SPREAD_RANGE[0] <= std <= SPREAD_RANGE[1]:
        yield Finding(
            "warning",
            f"The normalised segment rewards of the first rollouts have mean {mean:.2f} and std "
            f"{std:.2f} instead of 0 and 1: the normaliser was fitted on other text than the "
            "policy's.",
            "fit it on pairs that read like the policy's responses, and see that "
            "segmentation.cutoff suits the model: denserl segment --calibrate.",
        )


def unterminated(record: RunRecord) -> Iterator[Finding]:
    """Responses that run into the length limit."""
    terminated = record.series(TRAIN_PPO, "terminated")
    if terminated and terminated.late < UNTERMINATED:
        yield Finding(
            "warning",
            f"Only {terminated.late:.0%} of the responses end by themselves; the others run into "
            "the length limit.",
            "raise ppo.rollout.max_new_tokens, set ppo.missing_eos_penalty, and see that "
            "chat.stop_tokens has what the model ends with.",
        )


def no_gain(record: RunRecord) -> Iterator[Finding]:
    """A reward that does not rise."""
    reward = _reward(record)
    if len(reward.values) >= 2 * POINTS and not _rises(reward):
        yield Finding(
            "warning",
            f"The reward did not rise: {reward.early:.3g} early, {reward.late:.3g} late.",
            "raise ppo.actor_learning_rate, lower ppo.kl_coef, take more responses in an iteration "
            "(ppo.rollout.batch_size, ppo.rollout.samples_per_prompt), or train longer.",
        )


def rough_updates(record: RunRecord) -> Iterator[Finding]:
    """Updates that are too large, or a critic that does not predict the returns."""
    clipped = record.series(TRAIN_PPO, "policy_clip_fraction")
    if clipped and clipped.late > POLICY_CLIPPED:
        yield Finding(
            "warning",
            f"{clipped.late:.0%} of the tokens leave PPO's clip range in an update: the steps are "
            "too large.",
            "lower ppo.actor_learning_rate or ppo.epochs, or raise ppo.train_batch_size.",
        )
    explained = record.series(TRAIN_PPO, "explained_variance")
    if len(explained.values) >= 2 * POINTS and explained.late < 0:
        yield Finding(
            "note",
            f"The critic does not predict the returns (explained variance {explained.late:.2f}): "
            "advantages are noisy.",
            "raise ppo.critic_learning_rate, train it first with ppo.critic_warmup, or set "
            "ppo.critic_init=reward_model.",
        )


def _reward(record: RunRecord) -> Series:
    """What PPO maximises, or else the reward model's score."""
    return record.series(TRAIN_PPO, "dense_reward") or record.series(TRAIN_PPO, "rm_score")


def _rises(reward: Series) -> bool:
    return bool(reward) and reward.late - reward.early > RISE * reward.values.std()


CHECKS: tuple[Check, ...] = (
    true_reward_lost,
    length_drift,
    segments_drift,
    kl_range,
    entropy_change,
    clipped_rewards,
    normalizer_floor,
    normalizer_fit,
    unterminated,
    no_gain,
    rough_updates,
)
