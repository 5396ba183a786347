"""What a source of rewards may ask for, by the names of its parameters, and what it promises."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal

from torch import Tensor

from denserl_cli.core.errors import DenserlError

Law = Literal["score", "final value - prompt value", "score - empty score"]


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What was measured on B responses. Tensors are (B, T) unless another shape is given.

    What a run has not measured is None: of the reward model without one, of a further model unless
    the source names one.

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

    tokens: Tensor
    mask: Tensor
    ends: Tensor
    groups: Tensor
    ended: Tensor
    logprobs: Tensor
    reference_logprobs: Tensor
    reference_entropy: Tensor
    places: Tensor
    token_values: Tensor | None = None
    normal_values: Tensor | None = None
    prompt_value: Tensor | None = None
    final_value: Tensor | None = None
    score: Tensor | None = None
    empty_score: Tensor | None = None
    shapley_values: Tensor | None = None
    attention: Tensor | None = None
    model_logprobs: Tensor | None = None


NAMES = tuple(field.name for field in fields(Inputs))


def asked(function: Callable[..., Any]) -> tuple[str, ...]:
    """The names of `Inputs` among a function's parameters."""
    return tuple(name for name in inspect.signature(function).parameters if name in NAMES)


def give(function: Callable[..., Tensor], inputs: Inputs, what: str) -> Tensor:
    """Call a source with what its parameters name. Raises DenserlError for what was not measured.

    what: the source, for the error.
    """
    given = {name: getattr(inputs, name) for name in asked(function)}
    if absent := [name for name, value in given.items() if value is None]:
        raise not_measured(what, absent[0])
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
    terms = [getattr(inputs, name.replace(" ", "_")) for name in law.split(" - ")]
    return terms[0] if len(terms) == 1 else terms[0] - terms[1]
