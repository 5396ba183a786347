"""Sampled responses in the course of the training, with the reward of each segment."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from denserl_cli.core.reporting.record import Line, is_number

STEPS, PROMPTS = 5, 3
"""The most iterations and prompts shown of one run; a comparison shows fewer."""
_VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"}
"""From control characters, which browsers and terminals do not show, to pictures of them."""


@dataclass(frozen=True)
class Segment:
    """A segment of a sample.

    Attributes:
        text: Of its tokens.
        tokens: Their number.
        value: The reward model's.
        reward: As text, with the decimals that the largest reward of the run needs; "" where it is
            not known.
        heat: The reward as a share of the largest one, from -1 to 1.
    """

    text: str
    tokens: int | None
    value: float | None
    reward: str
    heat: float | None


@dataclass(frozen=True)
class Sample:
    """A response of an iteration. reward: the sum of its segments' rewards."""

    step: int
    prompt: str
    tokens: int
    reward: float | None
    segments: Sequence[Segment]


@dataclass(frozen=True)
class Thread:
    """Samples that belong together: to one held-out prompt, or to one iteration."""

    heading: str
    samples: Sequence[Sample]


def threads(lines: Sequence[Line], steps: int = STEPS, prompts: int = PROMPTS) -> list[Thread]:
    """The samples to show, in the course of the training.

    Args:
        lines: Of samples.jsonl.
        steps: The most iterations to show.
        prompts: The most prompts to show.

    Returns:
        A thread for each held-out prompt or, without any, for each iteration.
    """
    held = [line for line in lines if line.get("held_out") is True]
    of = held or list(lines)
    chosen = _spread(sorted({line["step"] for line in of}), steps)
    of = [line for line in of if line["step"] in chosen]
    if held:
        names = list(dict.fromkeys(line["prompt"] for line in of))[:prompts]
        groups = {name: [line for line in of if line["prompt"] == name] for name in names}
    else:
        groups = {
            f"iteration {step}": [line for line in of if line["step"] == step][:prompts]
            for step in chosen
        }
    largest = max((abs(r) for group in groups.values() for r in _rewards(group)), default=0.0)
    return [
        Thread(_visible(heading), [_sample(line, largest) for line in group])
        for heading, group in groups.items()
    ]


def _spread(steps: Sequence[int], count: int) -> list[int]:
    """At most `count` of the steps, the first and the last among them."""
    if len(steps) <= count:
        return list(steps)
    return [steps[i] for i in np.linspace(0, len(steps) - 1, count).round().astype(int)]


def _rewards(lines: Sequence[Line]) -> list[float]:
    every = (one.get("reward") for line in lines for one in line["segments"])
    return [reward for reward in every if is_number(reward)]


def _sample(line: Line, largest: float) -> Sample:
    segments = [_segment(one, largest) for one in line["segments"]]
    rewards = _rewards([line])
    return Sample(
        step=line["step"],
        prompt=_visible(line["prompt"]),
        tokens=sum(one.tokens or 0 for one in segments),
        reward=sum(rewards) if rewards else None,
        segments=segments,
    )


def _segment(one: dict[str, Any], largest: float) -> Segment:
    value, reward = (one.get(name) if is_number(one.get(name)) else None
                     for name in ("value", "reward"))  # fmt: skip
    tokens = one.get("tokens")
    decimals = max(0, 2 - math.ceil(math.log10(largest))) if largest else 0
    return Segment(
        text=_visible(one["text"]),
        tokens=tokens if type(tokens) is int else None,
        value=value,
        reward="" if reward is None else f"{reward:+.{decimals}f}".replace("-", "−"),
        heat=None if reward is None else reward / largest if largest else 0.0,
    )


def _visible(text: str) -> str:
    """The text with visible control characters, and without what UTF-8 cannot encode."""
    return text.encode("utf-8", "replace").decode("utf-8").translate(_VISIBLE)
