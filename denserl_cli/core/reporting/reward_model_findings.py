"""Findings from the metrics of train-rm.

The constants are the thresholds. "Late" is the mean over the last fifth of the steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from denserl_cli.core.recipe.stages import TRAIN_RM
from denserl_cli.core.reporting.finding import POINTS, Check, Finding
from denserl_cli.core.reporting.record import RunRecord

ABOVE_BASELINE = 0.05
"""Accuracy that a reward model should have above a rule that looks at the length alone."""
ABOVE_CHANCE = 0.1
"""Accuracy within this distance of one half is no better than chance."""
FEW_PAIRS = 50
"""Fewer held-out pairs are named with their number: the accuracy's std is 7 points or more."""
LENGTH_GAP = 0.3
"""Difference in accuracy by which response is longer, above which scores depend on length."""
OVERFIT = 0.15
"""Training accuracy minus that on held-out pairs, above which a reward model overfits."""


def reward_model_baseline(record: RunRecord) -> Iterator[Finding]:
    """A reward model that is no better than chance, or than a rule about length."""
    accuracy, longer = (
        record.series(TRAIN_RM, "eval_accuracy"),
        record.series(TRAIN_RM, "eval_longer_accuracy"),
    )
    if not accuracy:
        return
    got = float(accuracy.values[-1])
    rules = {"prefer the longer response": float(longer.values[-1])} if longer else {}
    if shorter := _shorter_share(record.accuracy_by_length):
        rules["prefer the shorter response"] = shorter
    rule = max(rules, key=lambda name: rules[name], default=None)
    result = f"The reward model is right on {got:.1%} of {_held_out(record)}"
    if got < 0.5 - ABOVE_CHANCE:
        yield Finding(
            "serious",
            f"{result}, worse than chance: it prefers what the pairs call the worse response.",
            "see whether chosen and rejected are swapped in some of the pairs, hold out pairs of "
            "the kind that it is trained on, and hold out more of them (data.eval_pairs).",
        )
    elif got < 0.5 + ABOVE_CHANCE:
        yield Finding(
            "serious",
            f"{result}, hardly better than chance.",
            "train on more pairs or for more epochs (reward_model.epochs), raise "
            "reward_model.learning_rate, and look at the pairs: denserl segment shows them.",
        )
    elif rule is not None and got < rules[rule] + ABOVE_BASELINE:
        yield Finding(
            "serious",
            f"{result}, and the rule '{rule}' on {rules[rule]:.1%}: it may have learned little "
            "more than length.",
            "balance the lengths in the preference pairs, add pairs whose better response is the "
            "shorter one, and look at accuracy by length difference.",
        )


def reward_model_by_length(record: RunRecord) -> Iterator[Finding]:
    """A reward model that is right only where the better response is also the longer one."""
    sides = [_accuracy(record.accuracy_by_length, sign) for sign in (-1, 1)]
    if None in sides:
        return
    shorter, longer = (float(side) for side in sides if side is not None)
    low, high = sorted((shorter, longer))
    if high - low > LENGTH_GAP:
        word, other = ("shorter", "longer") if shorter < longer else ("longer", "shorter")
        yield Finding(
            "warning",
            f"Where the better response is the {word} one the reward model is right on {low:.0%} "
            f"of the pairs, where it is the {other} one on {high:.0%}: its scores depend on "
            "length.",
            "balance the lengths in the preference pairs; in PPO watch response_length, and set "
            "ppo.max_response_tokens with ppo.overlong_penalty.",
        )


def reward_model_overfit(record: RunRecord) -> Iterator[Finding]:
    """A reward model that is better on its training pairs than on held-out ones."""
    seen, held = record.series(TRAIN_RM, "accuracy"), record.series(TRAIN_RM, "eval_accuracy")
    if len(seen.values) < POINTS or not held or seen.late <= 0.5 + ABOVE_CHANCE:
        return
    if seen.late - held.values[-1] > OVERFIT:
        yield Finding(
            "warning",
            f"The reward model is right on {seen.late:.0%} of its training pairs and on "
            f"{held.values[-1]:.0%} of {_held_out(record)}: it overfits the training pairs.",
            "fewer reward_model.epochs, a lower reward_model.learning_rate, or more pairs.",
        )


def _held_out(record: RunRecord) -> str:
    """The held-out pairs for a sentence, with their number where they are few."""
    pairs = sum(one["pairs"] for one in record.accuracy_by_length)
    return f"only {pairs:g} held-out pairs" if 0 < pairs < FEW_PAIRS else "the held-out pairs"


def _shorter_share(bins: Sequence[Mapping[str, Any]]) -> float | None:
    """Accuracy of preferring the shorter response."""
    total = sum(one["pairs"] for one in bins)
    return sum(one["pairs"] for one in bins if _side(one) < 0) / total if total else None


def _accuracy(bins: Sequence[Mapping[str, Any]], side: int) -> float | None:
    """Accuracy on the pairs whose better response is the longer (1) or the shorter one (-1)."""
    mine = [one for one in bins if _side(one) == side]
    pairs = sum(one["pairs"] for one in mine)
    return sum(one["pairs"] * one["accuracy"] for one in mine) / pairs if pairs else None


def _side(one: Mapping[str, Any]) -> int:
    """Sign of a bin's length difference."""
    shortest, longest = one.get("shortest"), one.get("longest")
    if shortest is not None and shortest > 0:
        return 1
    return -1 if longest is not None and longest < 0 else 0


CHECKS: tuple[Check, ...] = (reward_model_baseline, reward_model_by_length, reward_model_overfit)
