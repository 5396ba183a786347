"""What a source of rewards may ask for, by the names of its parameters, and what it promises."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

from torch import Tensor

from denserl_cli.core.errors import DenserlError

if TYPE_CHECKING:
    from denserl_cli.core.recipe.schema import RewardSource

Law = Literal["score", "final value - prompt value", "score - empty score"]
"""What a source promises that the rewards of a response add up to."""
LAWS: tuple[Law, ...] = get_args(Law)


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What was measured on B responses. Tensors are (B, T) unless another shape is given.

    What nobody asked for, or the run does not measure, is None.

    Attributes:
        tokens: int64, ids of the response.
        mask: bool, of the response.
        ends: bool, of the segments.
        groups: int64, number of each token's segment; -1 outside every segment.
        ended: (B,) bool, whether each response ended by itself.
        logprobs: Nats, of the policy that sampled.
        reference_logprobs: Nats, of the reference.
        reference_entropy: Nats, of the reference after each token.
        token_values: The reward model's, at each token.
        normal_values: The same at segment ends, normalised by location; 0 elsewhere.
        prompt_value: (B,), the reward model's, at the prompt's last token.
        final_value: (B,), the reward model's, at the last segment's end.
        score: (B,), the reward model's, of the whole response.
        empty_score: (B,), of the response without any segment.
        shapley_values: At segment ends, of each segment; 0 elsewhere.
        attention: Of the reward model's last layer from the last token, 1 in sum.
        model_logprobs: Nats, of the further policy that the source names.
        places: bool, where differences are taken: segment ends, or with bandit every token.
    """

    tokens: Tensor | None = None
    mask: Tensor | None = None
    ends: Tensor | None = None
    groups: Tensor | None = None
    ended: Tensor | None = None
    logprobs: Tensor | None = None
    reference_logprobs: Tensor | None = None
    reference_entropy: Tensor | None = None
    places: Tensor | None = None
    token_values: Tensor | None = None
    normal_values: Tensor | None = None
    prompt_value: Tensor | None = None
    final_value: Tensor | None = None
    score: Tensor | None = None
    empty_score: Tensor | None = None
    shapley_values: Tensor | None = None
    attention: Tensor | None = None
    model_logprobs: Tensor | None = None


OF_REWARD_MODEL = (
    *("token_values", "normal_values", "prompt_value", "final_value", "score"),
    *("empty_score", "shapley_values", "attention"),
)
"""The names of what a reward model is asked for."""
NAMES = tuple(field.name for field in fields(Inputs))


class Asked(NamedTuple):
    """What a source asks for.

    Attributes:
        source: Of the recipe.
        names: Of `Inputs`.
    """

    source: RewardSource
    names: tuple[str, ...]


def asked_by(function: Callable[..., Any], law: Law | None = None) -> tuple[str, ...]:
    """The names of `Inputs` that a function's parameters and its law ask for."""
    named = {*inspect.signature(function).parameters, *(_terms(law) if law else ())}
    return tuple(name for name in NAMES if name in named)


def give(function: Callable[..., Tensor], inputs: Inputs, what: str) -> Tensor:
    """Call a source with what its parameters name. Raises DenserlError for what was not measured.

    what: the source, for the error.
    """
    given = {name: getattr(inputs, name) for name in asked_by(function)}
    for name, value in given.items():
        if value is None:
            raise not_measured(what, name)
    return function(**given)


def not_measured(what: str, name: str) -> DenserlError:
    """The error for a source that asks for what the run does not measure."""
    return DenserlError(
        f"the reward {what} asks for {name}, which this run does not measure",
        hint="values of a reward model need a source that reads it, such as {source: values, "
        "weight: 0}; model_logprobs need the source's own `model`",
    )


def promised(law: Law, inputs: Inputs) -> Tensor:
    """What a law says that each response's rewards add up to: (B,)."""
    whole, *less = (getattr(inputs, name) for name in _terms(law))
    return whole - less[0] if less else whole


def _terms(law: Law) -> list[str]:
    return [term.replace(" ", "_") for term in law.split(" - ")]
